"""What was read from a file, the Hub or a server, checked by a pydantic model before anything is made of it.

In: a type, and JSON or a value from elsewhere. Out: an instance of the type, or an error that names the place, the
field, what was found there and the remedy. `Measurement` is what all scored rows, reports and dictionaries have.
"""

from __future__ import annotations

import functools
import json
import math
import reprlib
from collections.abc import Callable
from numbers import Integral
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    GetPydanticSchema,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import ErrorDetails, core_schema

T = TypeVar("T")
_adapter = functools.cache(TypeAdapter)  # making one takes longer than a check
Width = Annotated[int, Field(ge=1, le=1 << 24)]  # features: beyond the widest SAE there is, arrays fill the memory


def from_json(kind: Any, make: Callable[[Any], Any]) -> GetPydanticSchema:
    """How a saved field is read: checked as `kind`, then turned into what the record holds."""
    return GetPydanticSchema(
        lambda _, handler: core_schema.no_info_after_validator_function(make, handler.generate_schema(kind))
    )


def _number(value: Any) -> Any:
    return math.nan if value is None else math.inf if value == "Infinity" else value


# Fields of records that are saved as JSON, which has neither arrays nor NaN.
Number = Annotated[float, BeforeValidator(_number)]
Numbers = Annotated[np.ndarray, from_json(list[Number], np.array)]
Interval = tuple[Number, Number]
Ids = Annotated[np.ndarray, from_json(list[NonNegativeInt], lambda ids: np.array(ids, np.int64))]


class Strict(BaseModel):
    """No type is converted, unknown fields are kept."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class Measurement(Strict):
    """What identifies a measurement; `SAEFeaturizer.measurement` has all of it."""

    d_sae: Width
    keep_above: Annotated[FiniteFloat, Field(ge=0)]
    model: str | None = None
    layer: Annotated[int, Field(ge=0)] | None = None
    activation: str | None = None
    pool_over: str | None = None
    side: str | None = None
    fingerprint: str | None = None
    feature_fingerprint: str | None = None


class WholeMeasurement(Measurement):
    """All that a measurement says since hf_fac writes it."""

    model: str
    layer: Annotated[int, Field(ge=0)]
    activation: str
    pool_over: str
    side: str
    fingerprint: str


def checked(kind: type[T], found: Any, where: str, remedy: str) -> T:
    """Returns `found`, a value or JSON (a string or bytes), as an instance of `kind`.

    Raises: ValueError in one line: where, which field, what is wrong with it, what was found, and the remedy.
    """
    adapter = _adapter(kind)
    try:
        return adapter.validate_json(found) if isinstance(found, str | bytes) else adapter.validate_python(found)
    except ValidationError as error:
        told = ", ".join(_told(one) for one in error.errors(include_url=False)[:3])
        raise ValueError(f"{where}: {told}; {remedy}.") from error


def check_counts(**counts: Any) -> None:
    """Raises: ValueError, by name, for what is neither None nor a whole number from 1 up."""
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 up.")


def read_measurement(text: str, where: str, remedy: str) -> dict[str, Any]:
    """Returns the measurement that is kept as JSON beside rows. Raises: ValueError, as `checked` does."""
    checked(Measurement, text, where, remedy)
    return json.loads(text)


def _told(error: ErrorDetails) -> str:
    place = "".join(f"{part}." for part in error["loc"])[:-1]
    # Of a whole file or object nobody wants to read the beginning.
    got = "" if error["type"] in ("json_invalid", "missing", "value_error") else f", got {reprlib.repr(error['input'])}"
    return f"{place + ': ' if place else ''}{error['msg'].removeprefix('Value error, ')}{got}"
