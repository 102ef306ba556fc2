"""Methods of other people's packages: found by entry points, loaded when a register is first asked."""

from __future__ import annotations

from importlib.metadata import entry_points

from plait.errors import EnvironmentFault

# The entry point groups in which packages name modules that register methods.
MERGES, SUBSPACES = "plait.methods", "plait.subspaces"


def load_plugins(group: str) -> None:
    """Import every module that an installed package names under an entry point group; importing it registers its methods.

    Args:
        group: Name of the group, such as "plait.methods".

    Raises:
        EnvironmentFault: A module that cannot be imported, or registers a name that is taken; its package is named.
    """
    for point in entry_points(group=group):
        try:
            point.load()
        except Exception as e:
            package = point.dist.name if point.dist else "an unknown package"
            raise EnvironmentFault(
                f"the plug-in {point.name!r} of {package} cannot be loaded: {type(e).__name__}: {e}",
                where=point.value,
                hint=f"pip uninstall {package}, or mend it",
            ) from e
