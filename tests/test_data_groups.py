"""A manifest's groups (patients) are not torn apart when a training run makes or is given its validation set."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.data import open_splits
from engine.errors import UserError


def manifest(folder: Path, rows: list[tuple[str, str, str]], header: str = "filename,label,group") -> Path:
    """(label, group, split) for each image."""
    lines = [header]
    for i, (label, group, split) in enumerate(rows):
        (folder / f"{i}.png").touch()
        lines.append(",".join((f"{i}.png", label, group, split)[: header.count(",") + 1]))
    path = folder / "images.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("seed", range(5))
def test_validation_takes_whole_groups(tmp_path, seed):
    rows = [("sick" if g % 3 else "well", f"patient {g}", "") for g in range(30) for _ in range(1 + g % 4)]
    splits = open_splits(csv=manifest(tmp_path, rows), val_fraction=0.2, seed=seed)
    assert not set(splits.train.groups) & set(splits.val.groups)
    assert 0.1 < len(splits.val) / len(rows) < 0.3
    assert (splits.train.class_counts() > 0).all()
    assert (splits.val.class_counts() > 0).all()
    again = open_splits(csv=tmp_path / "images.csv", val_fraction=0.2, seed=seed)
    assert again.val.files == splits.val.files
    other = open_splits(csv=tmp_path / "images.csv", val_fraction=0.2, seed=seed + 5)
    assert set(other.val.files) != set(splits.val.files)


@pytest.mark.parametrize("seed", range(5))
def test_a_class_of_one_group_stays_in_training(tmp_path, seed):
    rows = [("rare", "only", "")] * 8 + [("usual", f"p{i}", "") for i in range(8)]
    for fraction in (0.4, 0.7):  # of which the second would rather have it in validation
        splits = open_splits(csv=manifest(tmp_path, rows), val_fraction=fraction, seed=seed)
        assert splits.train.class_counts()[0] == 8
        assert len(splits.val) > 0


def test_one_group_alone_gives_no_validation_set(tmp_path):
    with pytest.raises(UserError, match="no class has two groups, so none can be left out for validation"):
        open_splits(csv=manifest(tmp_path, [("a", "p", ""), ("b", "p", "")]))


def test_a_group_on_two_sides_is_refused_with_the_way_out(tmp_path):
    rows = [("a", "p1", "train"), ("b", "p2", "train"), ("a", "p3", "val"), ("b", "p1", "test")]
    path = manifest(tmp_path, rows, "filename,label,group,split")
    with pytest.raises(UserError, match=r"group 'p1' is in both train and test: .*engine\.split --group-column"):
        open_splits(csv=path)
