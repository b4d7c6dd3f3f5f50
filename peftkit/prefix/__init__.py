"""KV prefixes: trained keys and values that every query of an attention attends to."""

from peftkit.prefix.config import PrefixConfig
from peftkit.prefix.inject import add_prefixes, remove_prefixes
from peftkit.prefix.module import Prefix, PrefixSite

__all__ = ["Prefix", "PrefixConfig", "PrefixSite", "add_prefixes", "remove_prefixes"]
