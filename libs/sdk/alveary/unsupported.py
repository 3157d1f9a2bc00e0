"""Parameters that are refused, with what to use: those that Azure alone has, and two names for the same. Standard library alone."""

from __future__ import annotations

from alveary.errors import AlvearyError


def refuse_given(**given: tuple[object, str]) -> None:
    """Refuse parameters that were given: by name the value, and the sentence that says what to use. None is not given.

    Raises:
        AlvearyError: a value is not None; names the parameter.
    """
    for name, (value, instead) in given.items():
        if value is not None:
            raise AlvearyError(f"{name} is not offered: {instead}", "UNIMPLEMENTED")


def refuse_run_type(type: str | None) -> None:
    """Refuse a filter by the type of runs.

    Raises:
        AlvearyError: it is not None.
    """
    refuse_given(type=(type, "runs have no types here; filter by tags or properties"))


def refuse_model_extras(sample_input_dataset: object, sample_output_dataset: object, resource_configuration: object) -> None:
    """Refuse what Azure stores beside a model for its deployments.

    Raises:
        AlvearyError: one of them is not None.
    """
    refuse_given(
        sample_input_dataset=(sample_input_dataset, "models keep no samples; add them to the model's folder"),
        sample_output_dataset=(sample_output_dataset, "models keep no samples; add them to the model's folder"),
        resource_configuration=(resource_configuration, "resources are asked for where a model is used; leave it out"),
    )


def one_of(**given: str | None) -> str | None:
    """The one of several names for the same that was given.

    Raises:
        AlvearyError: several were.
    """
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) > 1:
        raise AlvearyError(f"{' and '.join(found)} are the same: give one of them", "INVALID_ARGUMENT")
    return next(iter(found.values()), None)
