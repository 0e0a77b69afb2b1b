"""Texts from the user's own files and from `datasets`: what is read, what is held out, and what is refused."""

import json

import pytest

from bayesprune.app.data.texts import Columns, Rows, classified_texts, plain_texts, read_rows

pytest.importorskip("datasets")
ROWS = [(f"text number {number}", number % 2) for number in range(40)]
PLAIN = Columns(has_labels=False)


def write(path, rows=ROWS, header="sentence\tlabel"):
    lines = [header, *(f"{text}\t{label}" for text, label in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_a_single_file_gives_three_splits_that_are_stratified_and_disjoint(tmp_path):
    texts = classified_texts(write(tmp_path / "all.tsv"), Columns())
    splits = (texts.train, texts.validation, texts.test)
    assert [len(split.texts) for split in splits] == [36 - 2, 2, 4]
    assert sorted(text for split in splits for text in split.texts) == sorted(text for text, _ in ROWS)
    assert texts.test.texts == [text for text, _ in ROWS[-4:]]
    assert [sum(split.labels) * 2 for split in splits] == [34, 2, 4]
    assert (texts.class_names, texts.are_numbered) == (("0", "1"), True)


def test_a_folder_gives_its_own_splits_and_a_lone_second_one_is_the_test(tmp_path):
    write(tmp_path / "train.tsv")
    write(tmp_path / "dev.tsv", ROWS[:6])
    texts = classified_texts(str(tmp_path), Columns())
    assert (len(texts.train.texts), len(texts.validation.texts), len(texts.test.texts)) == (36, 4, 6)
    write(tmp_path / "test.tsv", ROWS[:8])
    texts = classified_texts(str(tmp_path), Columns())
    assert (len(texts.train.texts), len(texts.validation.texts), len(texts.test.texts)) == (40, 6, 8)


def test_all_kinds_of_files_say_the_same(tmp_path):
    rows = [('a "quoted", text', "good"), ("plain", "bad"), ("été", "good"), ("more", "bad")]
    (tmp_path / "a.csv").write_text(
        'label,text\ngood,"a ""quoted"", text"\nbad,plain\ngood,été\nbad,more\n', encoding="utf-8-sig"
    )
    write(tmp_path / "a.tsv", rows, "text\tlabel")
    objects = [{"text": text, "label": label} for text, label in rows]
    (tmp_path / "a.json").write_text(json.dumps(objects))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, objects)))
    found = [read_rows(tmp_path / f"a.{kind}", Columns()) for kind in ("csv", "tsv", "json", "jsonl")]
    assert all(rows == found[0] for rows in found)
    assert found[0].texts == [text for text, _ in rows]


def test_cells_of_tables_are_strings_whatever_they_look_like(tmp_path):
    path = tmp_path / "with [brackets] *.csv"
    path.write_text("text,label\n12,01\nNA,2\n\nnull,03\n")
    assert read_rows(path, Columns()) == Rows(["12", "NA", "null"], ["01", "2", "03"])


@pytest.mark.parametrize(
    "content",
    [
        ",text,label\n0,a,1\n1,b,2\n",
        "text,label,\na,1,\nb,2,\n",
        "\ntext,label\na,1\nb,2\n",
        ",,text,label\n0,0,a,1\n1,1,b,2\n",
    ],
    ids=["an index", "a comma at the end", "an empty line first", "two indices"],
)
def test_columns_may_have_no_names(content, tmp_path):
    (tmp_path / "a.csv").write_text(content)
    assert read_rows(tmp_path / "a.csv", Columns()) == Rows(["a", "b"], ["1", "2"])


def test_a_file_that_changed_is_read_anew(tmp_path):
    path = tmp_path / "a.json"
    for text in ("old", "newer"):
        path.write_text(json.dumps([{"text": text, "label": 1}]))
        assert read_rows(path, Columns()).texts == [text]


def test_names_of_classes_are_in_order_of_numbers_or_of_the_alphabet(tmp_path):
    numbers = write(tmp_path / "numbers.tsv", [(text, 3 * (i % 4)) for i, (text, _) in enumerate(ROWS)])
    assert classified_texts(numbers, Columns()).class_names == ("0", "3", "6", "9")
    words = write(tmp_path / "words.tsv", [(text, ("ok", "bad")[label]) for text, label in ROWS])
    texts = classified_texts(words, Columns())
    assert (texts.class_names, texts.are_numbered, texts.train.labels[:2]) == (("bad", "ok"), False, [1, 0])


@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
def test_rows_whose_label_does_not_count_are_left_out(kind, tmp_path, caplog):
    rows = [*ROWS[:10], ("no class", -100), *ROWS[10:], ("nor this", -100)]
    path = tmp_path / f"a.{kind}"
    write(path, rows)
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    texts = classified_texts(str(path), Columns())
    assert (texts.class_names, texts.are_numbered) == (("0", "1"), True)
    splits = (texts.train, texts.validation, texts.test)
    assert sorted(text for split in splits for text in split.texts) == sorted(text for text, _ in ROWS)
    assert "2 rows are left out: their label -100 does not count" in caplog.text


def test_columns_of_any_name_can_be_given(tmp_path):
    path = write(tmp_path / "a.tsv", header="utterance\tintent")
    assert len(classified_texts(path, Columns("utterance", "intent")).train.texts) == 34
    with pytest.raises(ValueError, match=r"no column 'words'; it has 'utterance', 'intent'.*--text-column"):
        classified_texts(path, Columns("words", "intent"))


def test_texts_without_labels(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    assert plain_texts(str(tmp_path), PLAIN) == {"train": ["first", "second"]}
    (tmp_path / "test.txt").write_text("test")
    with pytest.raises(ValueError, match="no training split; it has test"):
        plain_texts(str(tmp_path), PLAIN)
    (tmp_path / "test.txt").unlink()
    (tmp_path / "train.txt").write_text("train")
    (tmp_path / "val.txt").write_text("val")
    (tmp_path / "b.txt").write_text("")
    assert plain_texts(str(tmp_path), PLAIN) == {"train": ["train"], "test": ["val"]}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", "utterance\tintent\nhi\t0\n", "no column of texts, such as text, sentence; it has 'utterance'"),
        ("a.tsv", "hi\t0\nho\t1\n", "no column of texts"),
        ("a.tsv", "text\tlabel\nhi\t0\nhi\n", "row 2 has no label"),
        ("a.tsv", "text\tlabel\nhi\t\n", "row 1 has no label"),
        ("a.tsv", "text\tlabel\nhi\t-100\nho\t -100\n", "every label is -100, with which a row does not count"),
        ("a.tsv", "text\tlabel\n", r"a\.tsv cannot be read .* expected a first line of names, then rows"),
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label\na,1\nb,c,2\n", "line 3, saw 3.* expected .* texts with commas in quotes"),
        ("a.csv", "text,label\na,b,1\nc,d,2\n", r"a\.csv cannot be read .* texts with commas in quotes"),
        ("a.csv", "text,score\nhi,0\n", "no column of labels"),
        ("a.json", '[{"text": "hi", "label": 0.5}, {"text": "ho", "label": 1.5}]', "0.5 are no classes"),
        ("a.json", '[{"text": 7, "label": 0}]', "the text of row 1 is 7"),
        ("a.json", "[1, 2", r"a\.json cannot be read .* expected a list of objects"),
        ("a.json", "[]", r"a\.json cannot be read .* expected a list of objects"),
        ("a.json", "\n", r"a\.json cannot be read .* expected a list of objects"),
        ("a.json", b'[{"text": "\xff\xfe", "label": 0}]', r"a\.json cannot be read .* in UTF-8"),
        ("a.jsonl", '{"text": "hi", "label": 0}\nlabel 1\n', r"a\.jsonl cannot be read .* one of them per line"),
        ("a.tsv", "text\tlabel\nhi\t0\nho\t0\n", "all labels are '0'"),
        ("a.tsv", "text\tlabel\na\tx1\nb\tx2\nc\tx3\nd\tx4\n", "4 different labels in 4 rows"),
        ("a.tsv", "text\tlabel\na\t0\nb\t0\nc\t1\n", "one training text of class 1"),
        ("a.txt", "hello", "ends with '.txt'; expected .csv"),
        ("a.csv", b"text,label\n\xff\xfe,1\n", r"a\.csv is not in UTF-8"),
        ("a.csv", b"text,label\n" + b"good text,1\n" * 2000 + b"\xff\xfe,1\n", r"a\.csv is not in UTF-8"),
    ],
)
def test_what_cannot_be_read_is_said(name, content, said, tmp_path):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        classified_texts(str(tmp_path / name), Columns())


def test_splits_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no file or folder"):
        classified_texts(str(tmp_path / "missing.csv"), Columns())
    write(tmp_path / "test.tsv")
    with pytest.raises(ValueError, match="no training split; it has test"):
        classified_texts(str(tmp_path), Columns())
    write(tmp_path / "train.tsv")
    write(tmp_path / "test.tsv", [("new", 2)])
    with pytest.raises(ValueError, match="the label '2' is none of the training split's, which are 0, 1"):
        classified_texts(str(tmp_path), Columns())
    write(tmp_path / "test.csv")
    with pytest.raises(ValueError, match=r"both test\.csv and test\.tsv"):
        classified_texts(str(tmp_path), Columns())


def test_named_data_sets_have_names_of_classes_and_may_keep_labels_secret(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def split(labels):
        features = datasets.Features(idx=datasets.Value("int32"), sentence=datasets.Value("string"))
        features["label"] = datasets.ClassLabel(names=["negative", "positive"])
        rows = {"idx": list(range(len(labels))), "sentence": [f"text {i}" for i in range(len(labels))]}
        return datasets.Dataset.from_dict(rows | {"label": labels}, features=features)

    asked = []
    loaded = {"train": split([1, 0] * 10), "validation": split([0, 1]), "test": split([-1, -1])}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or loaded)
    texts = classified_texts("hfds/glue:sst2", Columns())
    assert asked == [("glue", "sst2")]
    assert (texts.class_names, texts.are_numbered) == (("negative", "positive"), True)
    assert texts.test.labels == [0, 1]
    assert texts.train.labels[:2] == [1, 0]
    assert plain_texts("hfds:glue", PLAIN)["test"] == ["text 0", "text 1"]
