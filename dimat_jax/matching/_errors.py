"""The error of networks, or batches, that cannot be matched."""

from dimat_jax.errors import UserError

__all__ = ["MatchingError"]


class MatchingError(UserError):
    """Networks cannot be matched, or not on these inputs. The message tells why."""
