"""Names of images, and what is wrong with folders of them."""

import numpy as np
import pytest

from dataset import split_files
from dataset.folders import (
    SPLITS,
    FolderImages,
    find_data_set,
    parse_name,
    read_split,
    true_positives,
)
from dataset.sample.folders import write_folders
from dataset.truth import read_truth
from model import WARNINGS, InputError
from recognition.job import report_split
from tests.recognition.toy import EAST, NORTH, name, picture, write_data_set, write_split


def put(folder, kind, file):
    (folder / kind).mkdir(parents=True, exist_ok=True)
    picture(0, 0).save(folder / kind / file)


def test_the_label_is_in_the_base_name_alone(tmp_path):
    file = "@0584291.21@4476924.92@17@T@040.43870@-080.00613@004702@00@@@@@@pitch1_yaw1@.jpg"
    label = parse_name(tmp_path / "me@home" / file)
    assert label.utm == (584291.21, 4476924.92) and label.zone == (17, True)
    assert label.heading_deg is None and label.note == "pitch1_yaw1"
    short = parse_name(tmp_path / "@123.4@567.8@.jpg")
    assert short.utm == (123.4, 567.8) and short.zone is None and short.note == ""
    assert parse_name(tmp_path / name(1e5, 1e6, heading="360")).heading_deg == 0
    assert parse_name(tmp_path / name(1e5, 1e6, zone="56", letter="H")).zone == (56, False)


@pytest.mark.parametrize(
    "file, says",
    [
        ("photo.jpg", "no position in its name"),
        ("a@b.jpg", "no position in its name"),
        ("@x@4477000@.jpg", "'x' for its UTM east"),
        ("@584000@@.jpg", "'' for its UTM north"),
        ("@nan@4477000@.jpg", "'nan' for its UTM east"),
        ("@584000@4477000@17@T@@@@@north@.jpg", "'north' for its heading"),
    ],
)
def test_a_name_without_a_position_is_refused_and_named(tmp_path, file, says):
    put(tmp_path, "database", file)
    with pytest.raises(InputError, match=says) as error:
        FolderImages([tmp_path])
    assert file in str(error.value)


@pytest.mark.parametrize("at", [(40.43870, -80.00613), (-80.00613, 40.43870), (139.7, 35.6)])
def test_degrees_are_refused(tmp_path, at):
    put(tmp_path, "database", f"@{at[0]}@{at[1]}@.jpg")
    with pytest.raises(InputError, match="seem to give degrees"):
        FolderImages([tmp_path])


def test_small_numbers_that_lie_apart_are_meters_of_a_local_system(tmp_path):
    for x, y in ((0.0, 0.0), (120.5, 3.0)):
        put(tmp_path, "database", f"@{x}@{y}@.jpg")
    assert FolderImages([tmp_path]).utm.tolist() == [[0.0, 0.0], [120.5, 3.0]]
    assert "they are taken for meters of a local system" in WARNINGS[-1]


def test_one_name_in_degrees_among_meters_is_refused_and_named(tmp_path):
    put(tmp_path, "database", name(EAST, NORTH))
    put(tmp_path, "database", "@40.43870@-80.00613@.jpg")
    with pytest.raises(InputError, match=r"1 names .* degrees \(first: @40\.43870@-80"):
        FolderImages([tmp_path])


def test_folders_below_may_be_links(tmp_path):
    (tmp_path / "city").mkdir()
    picture(0, 0).save(tmp_path / "city" / name(EAST, NORTH))
    (tmp_path / "database").mkdir()
    (tmp_path / "database" / "city").symlink_to(tmp_path / "city", target_is_directory=True)
    (tmp_path / "city" / "round").symlink_to(tmp_path / "database", target_is_directory=True)
    assert len(FolderImages([tmp_path / "database"])) == 1


def test_a_list_of_paths_beside_a_folder_says_which_images_it_has(tmp_path, capsys):
    folder = tmp_path / "database"
    names = [name(EAST + i, NORTH) for i in range(3)]
    for file in names:
        put(folder, "part", file)
    everything = FolderImages([folder]).paths
    assert len(everything) == 3 and "lists" not in capsys.readouterr().out
    listed = tmp_path / "database_images_paths.txt"
    listed.write_bytes(f"part/{names[2]}\r\n\r\npart/{names[0]}\r\n".encode())
    images = FolderImages([folder])
    assert images.paths == [everything[0], everything[2]]
    assert np.array_equal(images.utm[:, 0], [EAST, EAST + 2])
    assert "the 2 images that database_images_paths.txt lists" in capsys.readouterr().out
    listed.write_text(f"{names[0]}\n")
    with pytest.raises(InputError, match="database_images_paths.txt lists .* which is not there"):
        FolderImages([folder])


def test_small_numbers_of_a_local_system_are_meters(tmp_path):
    for file in ("@0@10@.jpg", "@20@170@.jpg", "@300@4000@.jpg"):
        put(tmp_path, "database", file)
    assert FolderImages([tmp_path]).utm.tolist() == [[0, 10], [20, 170], [300, 4000]]


@pytest.mark.parametrize("kind, missing", [("queries", "database"), ("database", "queries")])
def test_a_split_needs_queries_and_database(tmp_path, kind, missing):
    put(tmp_path, kind, name(EAST, NORTH))
    with pytest.raises(InputError, match=f"no folder {missing}/"):
        read_split(tmp_path, 25)
    (tmp_path / missing).mkdir()
    (tmp_path / missing / "._hidden@1000@1000@.jpg").touch()
    with pytest.raises(InputError, match="holds no image"):
        read_split(tmp_path, 25)


def test_positives_are_within_25_m_and_none_where_there_is_none(tmp_path):
    put(tmp_path / "a@b", "database/deep", name(EAST + 15, NORTH + 20, pano="edge"))
    put(tmp_path / "a@b", "database", name(EAST + 15, NORTH + 20.01, pano="out"))
    put(tmp_path / "a@b", "queries_v1", name(EAST, NORTH))
    put(tmp_path / "a@b", "queries_v1", name(EAST, NORTH + 500))
    split = read_split(tmp_path / "a@b", 25)
    assert [p.name for p in np.array(split.index.paths)[split.positives[0]]] == [
        name(EAST + 15, NORTH + 20, pano="edge")
    ]
    assert len(split.positives[1]) == 0 and split.without_positives == 1
    image, row, path = split.queries[1]
    assert image.size == (64, 48) and row == 1 and path.endswith("@.jpg")
    none = true_positives(np.zeros((1, 2)), np.array([[0, 25.1]]), 25)
    assert len(none) == 1 and len(none[0]) == 0


def test_two_folders_of_queries_are_taken_together_and_that_is_said(tmp_path):
    put(tmp_path, "database", name(EAST, NORTH))
    put(tmp_path, "queries_v1", name(EAST, NORTH))
    assert len(read_split(tmp_path, 25)) == 1 and not WARNINGS
    put(tmp_path, "queries_v2", name(EAST, NORTH + 1))
    assert len(read_split(tmp_path, 25)) == 2
    assert "has queries_v1 and queries_v2: they are taken together" in WARNINGS[0]


def test_two_zones_are_never_near_each_other_and_that_is_said(tmp_path):
    put(tmp_path, "database", name(EAST, NORTH, zone="17", letter="T"))
    put(tmp_path, "database", name(EAST, NORTH, zone="18", letter="T"))
    put(tmp_path, "queries", name(EAST, NORTH, zone="18", letter="T"))
    split = read_split(tmp_path, 25)
    assert split.positives[0].tolist() == [1]
    assert "spans the UTM zones 17 north, 18 north" in WARNINGS[0]


def test_letters_of_one_hemisphere_are_one_zone(tmp_path):
    put(tmp_path, "database", name(EAST, NORTH, zone="17", letter="S"))
    put(tmp_path, "queries", name(EAST, NORTH + 3, zone="17", letter="T"))
    assert len(read_split(tmp_path, 25).positives[0]) == 1 and not WARNINGS


def test_where_data_sets_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("DATASETS_FOLDER", raising=False)
    monkeypatch.chdir(tmp_path)
    assert find_data_set(None, "toy") is None
    images = write_data_set(tmp_path / "dataset" / "toy")
    assert find_data_set(None, "toy").resolve() == images
    with pytest.raises(InputError, match="--datasets_folder .* has no other/images/: it has toy"):
        find_data_set(tmp_path / "dataset", "other")
    monkeypatch.setenv("DATASETS_FOLDER", str(tmp_path))
    with pytest.raises(InputError, match="DATASETS_FOLDER .* it has no data set at all"):
        find_data_set(None, "toy")
    assert find_data_set(tmp_path / "dataset", "toy") == images


def test_the_sample_is_written_as_folders_with_a_night(sample, tmp_path):
    write_folders(sample, tmp_path / "folders")
    for split in SPLITS:
        found = read_split(tmp_path / "folders" / "sample" / "images" / split, 25)
        utm_query, utm_index, _ = read_truth(sample / split_files(split)[2])
        assert np.allclose(
            sorted(map(tuple, found.utm_query)), sorted(map(tuple, utm_query)), atol=0.01
        )
        assert len(found.index) == len(utm_index)
    by_day = read_split(tmp_path / "folders" / "sample" / "images" / "test", 25)
    by_night = read_split(tmp_path / "folders" / "night" / "images" / "test", 25)
    assert np.array_equal(by_night.utm_query, by_day.utm_query)
    assert set(by_night.queries.notes) == {"night"} and set(by_day.queries.notes) == {""}
    mean = [np.mean([np.asarray(q[0]) for q in s.queries]) for s in (by_day, by_night)]
    assert mean[1] < 0.6 * mean[0]


def test_the_toy_has_what_other_tests_count_on(tmp_path):
    write_split(tmp_path, range(3), 2)
    split = read_split(tmp_path, 25)
    assert (len(split), len(split.index)) == (6, 9) and not split.without_positives


def test_a_query_without_positives_is_a_miss_only_where_recall_is_asked_for(tmp_path, capsys):
    write_split(tmp_path, range(2))
    put(tmp_path, "queries", name(EAST, NORTH + 900))
    split = read_split(tmp_path, 25)
    report_split("toy train", split, 0)
    assert capsys.readouterr().out == "toy train: 3 queries, 6 database images.\n"
    report_split("toy val", split, 5)
    assert "toy val: 1 queries have no database image within 25 m" in capsys.readouterr().out
