"""The embedded captioned pictures: Noto's colour emoji as a TFDS builder."""

import functools
import importlib.resources
import json
import re
from collections import Counter

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

SHEET, TABLE = "emoji.png", "emoji.json"
SIZE, COLUMNS = 32, 64  # of a picture, in pixels; of the sheet, in pictures
FIELDS = ("emoji", "name", "group", "subgroup", "keywords")  # of the table
GROUPS = (
    "smileys and emotion", "people and body", "component", "animals and nature", "food and drink",
    "travel and places", "activities", "objects", "symbols", "flags",
)  # fmt: skip
# Names of these say little about the picture, or nothing that another one teaches.
LEFT_OUT = ("component", "symbols", "flags")
HELD_OUT = 0.1  # share of the combinations
_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
_ADULTS = {"\U0001f468": "man", "\U0001f469": "woman", "\U0001f9d1": "person"}
_SIGNS = {"\u200d\u2642": "man", "\u200d\u2640": "woman"}
_PERSON = "\U0001f9d1"


@functools.cache
def emoji_table():
    """What the pictures are, in their order on the sheet.

    Returns:
      A list of dicts: "emoji" (the characters), "name" (CLDR's short name, as lower case as it
      is), "group" (of GROUPS), "subgroup" (number), "keywords" (list of strings).
    """
    text = (importlib.resources.files("liftplace_jax.data") / TABLE).read_text("utf-8")
    fields, *rows = json.loads(text)
    table = [dict(zip(fields, row, strict=True)) for row in rows]
    return [entry | {"group": GROUPS[entry["group"]]} for entry in table]


@functools.cache
def emoji_pictures():
    """(N, 32, 32, 3) uint8, on white, in the order of `emoji_table`; not to be written to."""
    resource = importlib.resources.files("liftplace_jax.data") / SHEET
    with resource.open("rb") as file, Image.open(file) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    rows = pixels.reshape(-1, SIZE, COLUMNS, SIZE, 3).swapaxes(1, 2)
    pictures = rows.reshape(-1, SIZE, SIZE, 3)[: len(emoji_table())]
    pictures.setflags(write=False)
    return pictures


def caption(entry):
    """The caption of an entry of `emoji_table`: its name in lower case."""
    return entry["name"].lower()


def words(text):
    """The words of a caption, a set."""
    return set(re.findall(r"[^\W_]+", text.lower()))


def composition(characters):
    """What a person's emoji is put together of.

    Args:
      characters: of the emoji.

    Returns:
      (activity: characters without gender and tone, gender: "man", "woman" or "person", tones: a
      string of their characters, perhaps empty).
    """
    tones = "".join(_TONES.findall(characters))
    activity, gender = _TONES.sub("", characters).replace("\ufe0f", ""), "person"
    for sign, meaning in _SIGNS.items():
        if sign in activity:
            activity, gender = activity.replace(sign, "", 1), meaning
    first, rest = activity[:1], activity[1:]
    if first in _ADULTS and rest.startswith("\u200d"):
        activity, gender = _PERSON + rest, _ADULTS[first]
    return activity, gender, tones


def split_indices(table):
    """The fixed split by composition: of people, about a tenth of all combinations is never seen.

    Held out are 10 % of the pairs (activity, gender), of activities that there are in several
    genders, one at most of each, in every tone; and of what is left 10 % of the pairs (person,
    skin tone). They are taken in an order drawn by Philox with seed 0, but for those without which
    a word of a caption would be in no training caption.

    Args:
      table: as of `emoji_table`.

    Returns:
      (train, test), two increasing int arrays that together hold every index once.
    """
    parts = [composition(entry["emoji"]) for entry in table]
    people = [i for i, entry in enumerate(table) if entry["group"] == GROUPS[1]]
    held = _Held([words(caption(entry)) for entry in table])
    genders, tones = {}, {}
    for index in people:
        activity, gender, _ = parts[index]
        genders.setdefault((activity, gender), []).append(index)
    number = Counter(activity for activity, _ in genders)
    pairs = {pair: members for pair, members in genders.items() if number[pair[0]] > 1}
    held.take(pairs, once=True)
    for index in people:
        if parts[index][2] and index not in held.indices:
            tones.setdefault(parts[index], []).append(index)
    held.take(tones, once=False)
    test = np.sort(np.asarray(list(held.indices), np.int64))
    return np.setdiff1d(np.arange(len(table)), test), test


class _Held:
    """Examples that are held out, and how often every word is in the others."""

    def __init__(self, captions):
        self._captions = captions
        self._left = Counter(word for caption in captions for word in caption)
        self.indices = set()

    def take(self, pairs, once):
        """Takes a share HELD_OUT of the pairs; once: one at most of each first part."""
        names = sorted(pairs)
        wanted, taken = round(HELD_OUT * len(names)), []
        # Raw bits, not Generator.permutation: NumPy keeps only the former the same for ever.
        order = np.argsort(np.random.Philox(0).random_raw(len(names)), kind="stable")
        for name in (names[place] for place in order):
            lost = Counter(word for index in pairs[name] for word in self._captions[index])
            if len(taken) == wanted:
                break
            if (once and name[0] in taken) or any(self._left[w] <= n for w, n in lost.items()):
                continue
            taken.append(name[0])
            self._left -= lost
            self.indices.update(pairs[name])


class EmojiConfig(tfds.core.BuilderConfig):
    """A variant: which pictures, and how large.

    Attributes:
      size: side of the pictures, 32 or 16.
      groups: those of GROUPS that are in it.
    """

    def __init__(self, name, size, groups, **options):
        super().__init__(name=name, **options)
        self.size, self.groups = size, groups

    def classes(self):
        """Function of an entry of `emoji_table` -> its class, and the names of all classes."""
        if len(self.groups) > 1:
            return (lambda entry: entry["group"]), list(self.groups)
        own = {entry["subgroup"] for entry in emoji_table() if entry["group"] in self.groups}
        return (lambda entry: f"{entry['subgroup']}"), [f"{number}" for number in sorted(own)]


def _variants():
    most = tuple(group for group in GROUPS if group not in LEFT_OUT)
    kinds = {
        "": (most, "all but flags, symbols and components of other emoji"),
        "all-": (GROUPS, "all"),
        "people-": ((GROUPS[1],), "people alone"),
    }
    return [
        EmojiConfig(f"{kind}{size}", size, groups, description=f"{text}; {size}x{size} pixels")
        for kind, (groups, text) in kinds.items()
        for size in (SIZE, SIZE // 2)
    ]


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Noto's colour emoji on white, with captions and classes; the test split by composition.

    `image` is (32, 32, 3) uint8, or (16, 16, 3), averages of four pixels; `text` is the caption,
    such as "woman firefighter: dark skin tone"; `label` is the group (of people alone, the number
    of the subgroup). What a network is told is up to its config: nothing, classes or captions.
    See `split_indices` for the splits. Pictures must not be mirrored: some captions say left or
    right. The files ship with this package (see `make_emoji`), so nothing is downloaded.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Noto Color Emoji 2.042, names of emojibase-data 17.0.0."}
    BUILDER_CONFIGS = _variants()
    DEFAULT_CONFIG_NAME = f"{SIZE}"
    builder_config: EmojiConfig
    # As of `Digits`.
    code_path = epath.Path(__file__)

    def _info(self):
        size = self.builder_config.size
        return tfds.core.DatasetInfo(
            builder=self,
            description="Noto Color Emoji, with their CLDR short names.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3)),
                    "text": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=self.builder_config.classes()[1]),
                }
            ),
            supervised_keys=("image", "text"),
            homepage="https://github.com/googlefonts/noto-emoji",
            license="Apache-2.0",
        )

    def _split_generators(self, dl_manager):
        train, test = split_indices(emoji_table())
        return {"train": self._generate_examples(train), "test": self._generate_examples(test)}

    def _generate_examples(self, indices):
        table, pictures = emoji_table(), emoji_pictures()
        class_of = self.builder_config.classes()[0]
        for index in indices:
            entry, picture = table[index], pictures[index]
            if entry["group"] not in self.builder_config.groups:
                continue
            if self.builder_config.size < SIZE:
                picture = np.asarray(Image.fromarray(picture).reduce(2))
            yield int(index), {"image": picture, "text": caption(entry), "label": class_of(entry)}
