"""What adakv raises besides ``ValueError``: one import for every floor of the package."""

from adakv._C import Error

__all__ = ["Error"]
