"""Exit code 0 when a gRPC server says that it serves: `python -m alveary_core.healthcheck HOST:PORT`."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from alveary_contracts.proxies import DIRECT


def main() -> int:
    """Ask once, within three seconds."""
    with grpc.insecure_channel(sys.argv[1], options=DIRECT) as channel:
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=3)  # type: ignore[attr-defined]
        except grpc.RpcError as error:
            print(error.code(), file=sys.stderr)
            return 1
    return 0 if reply.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
