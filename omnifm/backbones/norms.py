"""GroupNorm in place of BatchNorm: no running statistics, so nothing that a federation could average wrongly."""

from torch import nn

_GROUPS = 8


def replace_batch_norms(module: nn.Module) -> int:
    """Replace every 2-D BatchNorm below `module` by a GroupNorm over the same channels; return how many.

    Eight groups (Wu and He, ECCV 2018, find the number uncritical), fewer where they do not divide the channels.
    """
    replaced = 0
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            groups = next(g for g in range(min(_GROUPS, child.num_features), 0, -1) if child.num_features % g == 0)
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
            replaced += 1
        else:
            replaced += replace_batch_norms(child)
    return replaced
