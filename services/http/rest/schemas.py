"""Messages of llm.proto as JSON Schemas of their JSON."""

from typing import Any, Final

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor

_SCALARS: Final[dict[int, dict[str, Any]]] = {
    FieldDescriptor.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
    # Requests may hold numbers as texts.
    FieldDescriptor.TYPE_DOUBLE: {"type": ["number", "string"], "format": "double"},
    FieldDescriptor.TYPE_INT32: {"type": ["integer", "string"], "format": "int32"},
    # A text in answers, because JavaScript's numbers have 53 bits.
    FieldDescriptor.TYPE_INT64: {"type": ["string", "integer"], "format": "int64"},
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
}
_WELL_KNOWN: Final[dict[str, dict[str, Any]]] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?s$"},
    "google.protobuf.Any": {
        "type": "object",
        "properties": {"@type": {"type": "string"}},
        "required": ["@type"],
        "additionalProperties": True,
    },
}


class Schemas:
    """The schemas that a description refers to, by name."""

    def __init__(self) -> None:
        self.named: dict[str, Any] = {}
        """The schemas of #/components/schemas."""

    def of(self, message: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return the schema of a message by its descriptor: a reference, except for one `without` some fields."""
        if without:
            return self._object(message, without)
        if message.full_name in _WELL_KNOWN:
            return _WELL_KNOWN[message.full_name]
        if message.name not in self.named:
            # Named before its fields are, which may lead back to it.
            self.named[message.name] = {}
            self.named[message.name] |= self._object(message, ())
        return _reference(message.name)

    def _object(self, message: Any, without: tuple[str, ...]) -> dict[str, Any]:
        fields = {field.name: self._field(field) for field in message.fields if field.name not in without}
        return {"type": "object", "properties": fields}

    def _field(self, field: FieldDescriptor) -> dict[str, Any]:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value = field.message_type.fields_by_name["value"]
            return {"type": "object", "additionalProperties": self._field(value)}
        if field.message_type is not None:
            schema = self.of(field.message_type)
        elif field.enum_type is not None:
            schema = self._enum(field.enum_type)
        else:
            schema = _SCALARS[field.type]
        return {"type": "array", "items": schema} if field.is_repeated else schema

    def _enum(self, enum: EnumDescriptor) -> dict[str, Any]:
        self.named[enum.name] = {"type": "string", "enum": [value.name for value in enum.values]}
        return _reference(enum.name)


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}
