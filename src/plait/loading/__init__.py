"""What other programs load from a folder or file: an account tensor by tensor, independent of plait's own readers.

    >>> from plait.loading import accounts
    >>> for account in accounts("merged"):
    ...     print(account.loader, account.version, account.count("loaded"), [f.what for f in account.faults])

Everything here goes by names, shapes and configs: no weights are read, no base is needed, nothing but the standard library is
imported. `plait check --base` lets PEFT itself load a folder and compares.
"""

from plait.loading.account import Account, Effect, Fault, Placement
from plait.loading.loaders import LOADERS, accounts, loader_named, require_loadable

__all__ = ["LOADERS", "Account", "Effect", "Fault", "Placement", "accounts", "loader_named", "require_loadable"]
