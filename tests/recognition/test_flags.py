"""Values of flags that are refused."""

import pytest

from recognition import train_command


@pytest.mark.parametrize("recipe", ["netvlad", "cosplace"])
@pytest.mark.parametrize(
    "flag", ["seed=-1", "seed=18446744073709551616", "night=2", "night=-0.1", "hue=-1",
             "random_resized_crop=1.5", "weight_decay=-1", "num_preds_to_save=-1", "epochs_num=-1"],
)  # fmt: skip
def test_numbers_out_of_their_range_are_refused(recipe, flag, capsys):
    with pytest.raises(SystemExit) as stop:
        train_command.parse([f"--recipe={recipe}", f"--{flag}"])
    assert stop.value.code == 2
    assert f"argument --{flag.partition('=')[0]}: " in capsys.readouterr().err
