"""Visibility as the dependency diagram has it, and open to other workspaces."""

def visible_to(group):
    """Returns the visibility of a package that only the packages of a group may depend on.

    A package group cannot name packages of another repository. So the diagram holds where these
    packages are developed; in a workspace that uses them as `@xlstm` they are public.

    Args:
      group: the label of the package group.

    Returns:
      A value for `default_visibility`.
    """
    return [group] if native.repository_name() == "@" else ["//visibility:public"]
