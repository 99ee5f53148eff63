"""Finds the fields of kernel structures in the BTF of the running kernel.

See Documentation/bpf/btf.rst. libbpf parses it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from functools import cache

from steer.errors import KernelError
from steer.loader.libbpf import Closed, libbpf

STRUCT, TYPEDEF, FUNCTION = 4, 8, 12
"""Kinds of types: BTF_KIND_* of include/uapi/linux/btf.h."""
_COMPOSED = (STRUCT, 5)  # or a union
_MEMBER_BYTES = 12
_CURE = "needs a kernel with CONFIG_DEBUG_INFO_BTF"


class _Type(ctypes.Structure):
    """Mirrors struct btf_type."""

    _fields_ = (
        ("name_off", ctypes.c_uint32),
        ("info", ctypes.c_uint32),
        ("size_or_type", ctypes.c_uint32),
    )

    @property
    def kind(self) -> int:
        return int(self.info >> 24 & 0x1F)

    @property
    def has_bit_fields(self) -> bool:
        return bool(self.info >> 31)


class _Member(ctypes.Structure):
    """Mirrors struct btf_member."""

    _fields_ = (
        ("name_off", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
        ("offset", ctypes.c_uint32),
    )


class KernelTypes(Closed):
    """The types of the running kernel.

    Raises:
        KernelError: the kernel has no BTF, or libbpf is missing.
    """

    def __init__(self) -> None:
        self._calls = _calls()
        self._btf = self._calls.btf__load_vmlinux_btf()
        if not self._btf:
            number = ctypes.get_errno() or errno.ENOENT
            cause = OSError(number, os.strerror(number))
            raise KernelError.from_oserror("read the kernel's types", cause, cure=_CURE)

    def number(self, name: str, kind: int) -> int:
        """The id of a type, as needed to attach a program to it.

        Raises:
            KernelError: the kernel has no such type.
        """
        found = self._find(name, kind)
        if found is None:
            act = f"find {name} in the kernel's types"
            raise KernelError(act, "ENOENT", "needs a later kernel", errno=errno.ENOENT)
        return found

    def has(self, name: str, kind: int) -> bool:
        """Whether the kernel has such a type."""
        return self._find(name, kind) is not None

    def size_bytes(self, struct: str) -> int | None:
        """The size of a structure; None if the kernel has no such structure."""
        found = self._find(struct, STRUCT)
        return None if found is None else int(self._type(found).size_or_type)

    def offset_bits(self, struct: str, path: str) -> int | None:
        """Where a field begins; None if the kernel has no such field.

        Args:
            path: the name of the field, or several from the outside in: "ns.inum". Anonymous
                members are searched too.
        """
        number, offset = self._find(struct, STRUCT), 0
        for name in path.split("."):
            found = None if number is None else self._member(number, name)
            if found is None:
                return None
            offset += found[0]
            number = found[1]
        return offset

    def _find(self, name: str, kind: int) -> int | None:
        found = self._calls.btf__find_by_name_kind(self._btf, name.encode(), kind)
        return int(found) if found > 0 else None

    def _type(self, number: int) -> _Type:
        found: _Type = self._calls.btf__type_by_id(self._btf, number).contents
        return found

    def _member(self, struct: int, name: str) -> tuple[int, int] | None:
        """The offset in bits, and the type, of a member."""
        for member, has_bit_fields in self._members(struct):
            offset = member.offset & 0xFFFFFF if has_bit_fields else member.offset
            own = self._calls.btf__name_by_offset(self._btf, member.name_off)
            if own == name.encode():
                return offset, member.type
            inner = None if own else self._member(member.type, name)
            if inner:
                return offset + inner[0], inner[1]
        return None

    def _members(self, number: int) -> Iterator[tuple[_Member, bool]]:
        resolved = self._calls.btf__resolve_type(self._btf, number)
        if resolved < 0:
            return
        struct = self._type(resolved)
        if struct.kind not in _COMPOSED:
            return
        first = ctypes.addressof(struct) + ctypes.sizeof(_Type)
        for index in range(struct.info & 0xFFFF):
            member = _Member.from_address(first + index * _MEMBER_BYTES)
            yield member, struct.has_bit_fields

    def close(self) -> None:
        btf, self._btf = self._btf, None
        if btf:
            self._calls.btf__free(btf)


@cache
def _calls() -> ctypes.CDLL:
    lib = libbpf()
    lib.btf__load_vmlinux_btf.restype = ctypes.c_void_p
    lib.btf__find_by_name_kind.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32)
    lib.btf__type_by_id.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
    lib.btf__type_by_id.restype = ctypes.POINTER(_Type)
    lib.btf__resolve_type.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
    lib.btf__name_by_offset.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
    lib.btf__name_by_offset.restype = ctypes.c_char_p
    lib.btf__free.argtypes = (ctypes.c_void_p,)
    lib.btf__free.restype = None
    return lib
