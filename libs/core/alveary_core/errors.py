"""Errors as sentences for people, and as gRPC status for programs."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2


class AlvearyError(Exception):
    """Base: a sentence that says what was asked, what is wrong and what to do."""

    code: int = code_pb2.INTERNAL

    def details(self) -> Sequence[Message]:
        """Messages of google.rpc that a program can act on."""
        return ()

    def status(self) -> status_pb2.Status:
        """As google.rpc.Status."""
        packed = []
        for detail in self.details():
            any_message = any_pb2.Any()
            any_message.Pack(detail)
            packed.append(any_message)
        return status_pb2.Status(code=self.code, message=str(self), details=packed)

    @property
    def grpc_code(self) -> grpc.StatusCode:
        """The status code as grpc spells it."""
        return next(code for code in grpc.StatusCode if code.value[0] == self.code)


class InvalidArgument(AlvearyError):
    """Bad input. `violations` are (field, what is wrong) pairs."""

    code = code_pb2.INVALID_ARGUMENT

    def __init__(self, *violations: tuple[str, str]) -> None:
        super().__init__("; ".join(f"{field}: {what}" for field, what in violations))
        self.violations = violations

    def details(self) -> Sequence[Message]:
        violation = error_details_pb2.BadRequest.FieldViolation
        return [error_details_pb2.BadRequest(field_violations=[violation(field=f, description=d) for f, d in self.violations])]


class NotFound(AlvearyError):
    """There is no such thing."""

    code = code_pb2.NOT_FOUND

    def __init__(self, kind: str, name: str, hint: str = "") -> None:
        super().__init__(f"there is no {kind} {name!r}" + (f": {hint}" if hint else ""))
        self.kind, self.name = kind, name

    def details(self) -> Sequence[Message]:
        return [error_details_pb2.ResourceInfo(resource_type=self.kind, resource_name=self.name)]


class AlreadyExists(AlvearyError):
    """The name is taken."""

    code = code_pb2.ALREADY_EXISTS

    def __init__(self, kind: str, name: str, hint: str = "") -> None:
        super().__init__(f"{kind} {name!r} exists already" + (f": {hint}" if hint else ""))
        self.kind, self.name = kind, name

    def details(self) -> Sequence[Message]:
        return [error_details_pb2.ResourceInfo(resource_type=self.kind, resource_name=self.name)]


class FailedPrecondition(AlvearyError):
    """Right request, wrong moment."""

    code = code_pb2.FAILED_PRECONDITION

    def __init__(self, message: str, subject: str = "") -> None:
        super().__init__(message)
        self.subject = subject

    def details(self) -> Sequence[Message]:
        violation = error_details_pb2.PreconditionFailure.Violation(subject=self.subject, description=str(self))
        return [error_details_pb2.PreconditionFailure(violations=[violation])]


class ResourceExhausted(AlvearyError):
    """Too much, or too many."""

    code = code_pb2.RESOURCE_EXHAUSTED


class Unauthenticated(AlvearyError):
    """No token, or none that this platform issued."""

    code = code_pb2.UNAUTHENTICATED


class PermissionDenied(AlvearyError):
    """The token does not allow this."""

    code = code_pb2.PERMISSION_DENIED


class Aborted(AlvearyError):
    """Others wrote at the same time, again and again."""

    code = code_pb2.ABORTED


class Unavailable(AlvearyError):
    """Something that is needed does not answer now; trying again may help."""

    code = code_pb2.UNAVAILABLE


class DeadlineExceeded(AlvearyError):
    """It takes longer than it may."""

    code = code_pb2.DEADLINE_EXCEEDED
