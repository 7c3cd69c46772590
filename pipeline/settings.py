"""What every section of a configuration has in common."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator


class Settings(BaseModel):
    """Frozen; unknown keys are refused; numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _opened(cls, value: Any) -> Any:
        """An empty section of a YAML file has its defaults; ``encoder: resnet18`` is ``encoder: {name: resnet18}``."""
        if value is None:
            return {}
        if isinstance(value, str) and "name" in cls.model_fields:
            return {"name": value}
        if not isinstance(value, (dict, cls)):
            example = next(iter(cls.model_fields))
            raise ValueError(f"expected a section with fields such as {example!r}, found {value!r}")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python would take true for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"expected a number or a name, found {str(value).lower()}")
        return value


def problem(error: Mapping[str, Any]) -> str:
    """One of a ValidationError's ``errors()`` in words, with what was found (our own validators say that)."""
    own = error["msg"].removeprefix("Value error, ")
    return own if own != error["msg"] else f"{own}, found {error['input']!r}"
