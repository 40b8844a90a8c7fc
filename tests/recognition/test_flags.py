"""Values of flags that are refused."""

import pytest

import base
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


@pytest.mark.parametrize("flag", ["epochs=1.5", "lr=fast", "limit=", "image-size=x", "seed=1e3"])
def test_what_is_no_number_is_said_in_words(flag, capsys):
    with pytest.raises(SystemExit):
        base.parse([f"--{flag}"])
    name, value = flag.split("=")
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert f"argument --{name}: '{value}' is no " in sentence
