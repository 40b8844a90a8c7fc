"""The reader of GSV-Cities: names, places, and a sentence for everything that lacks."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.gsv_cities import COLUMNS, GsvCities, find_gsv_cities, image_name
from model import InputError


def rows_of(city: str, places: dict[int, int]) -> list[dict]:
    """Rows of a csv: so many images of each place."""
    return [
        {
            "place_id": str(place), "year": "2015", "month": str(1 + view), "northdeg": str(9 * view),
            "city_id": city, "lat": "41.8470", "lon": "-87.60020", "panoid": f"p_{place}-{view}",
        }
        for place, count in places.items()
        for view in range(count)
    ]  # fmt: skip


def write_city(folder: Path, city: str, rows: list[dict], columns: tuple = COLUMNS) -> None:
    for name in ("Dataframes", f"Images/{city}"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with open(folder / "Dataframes" / f"{city}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    for number, row in enumerate(rows):
        picture = Image.new("RGB", (12, 8), (number, 0, 0))
        picture.save(folder / "Images" / city / image_name(row, folder, number)[0])


@pytest.fixture
def folder(tmp_path) -> Path:
    write_city(tmp_path, "Chicago", rows_of("Chicago", {7: 4, 100_012: 5, 9: 3}))
    write_city(tmp_path, "OSL", rows_of("OSL", {7: 4}))
    return tmp_path


def test_names_are_those_of_the_published_program():
    row = {"place_id": "200123", "year": "2011", "month": "7", "northdeg": "5", "city_id": "PRS"}
    row |= {"lat": "48.8500", "lon": "2.350", "panoid": "a_B-c"}
    assert image_name(row, Path("x"), 2) == ("PRS_0000123_2011_07_005_48.8500_2.350_a_B-c.jpg", 123)


def test_places_of_different_cities_are_different_and_small_ones_are_dropped(folder):
    data = GsvCities(folder, 4)
    assert data.cities == ["Chicago", "OSL"] and data.dropped == 1
    assert np.bincount(data.place).tolist() == [4, 5, 4] and data.city_of.tolist() == [0, 0, 1]
    assert [data.names[i].split("_")[1] for i in (0, 4, 9)] == ["0000007", "0000012", "0000007"]
    image, number, path = data[10]
    assert image.size == (12, 8) and number == 10 and Path(path) == data.path(10)
    assert Path(path).parent.name == "OSL" and GsvCities(folder, 3).dropped == 0


def test_what_is_wrong_is_one_sentence(folder):
    with pytest.raises(InputError, match="none of the 4 places in .* has 6 images, the most has 5"):
        GsvCities(folder, 6)
    victim = next((folder / "Images" / "OSL").iterdir())
    victim.unlink()
    says = r"1 of the 4 images that .*OSL\.csv lists are not in .*OSL, first OSL_0000007"
    with pytest.raises(InputError, match=says):
        GsvCities(folder, 4)
    rows = rows_of("OSL", {1: 4})
    for broken, columns, says in (
        (rows, COLUMNS[:-1], r"OSL\.csv has no column panoid"),
        ([], COLUMNS, r"OSL\.csv lists no image"),
        ([{**rows[0], "year": "in May"}], COLUMNS, r"OSL\.csv, line 2: place_id, year"),
    ):
        (folder / "Dataframes" / "OSL.csv").unlink()
        with open(folder / "Dataframes" / "OSL.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(broken)
        with pytest.raises(InputError, match=says):
            GsvCities(folder, 4)
    (folder / "Dataframes" / "OSL.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"OSL\.csv cannot be read"):
        GsvCities(folder, 4)
    (folder / "Dataframes" / "OSL.csv").unlink()
    (folder / "Images" / "Chicago").rename(folder / "Images" / "elsewhere")
    with pytest.raises(InputError, match=r"there is no folder .*Chicago; unpack it there"):
        GsvCities(folder, 4)
    with pytest.raises(InputError, match=r"has no Dataframes/\*\.csv: name GSV-Cities' folder"):
        GsvCities(folder / "Images", 4)


def test_the_folder_is_found_beside_the_data_sets(folder, tmp_path):
    assert find_gsv_cities(None, [tmp_path / "none"]) is None
    assert find_gsv_cities(folder, []) == folder
    with pytest.raises(InputError, match="nowhere is no folder"):
        find_gsv_cities(Path("nowhere"), [])
    (tmp_path / "data" / "GSV-Cities" / "Dataframes").mkdir(parents=True)
    assert find_gsv_cities(None, [tmp_path / "data"]) == tmp_path / "data" / "GSV-Cities"
