"""Draws the embedded emoji: one sheet of pictures, and a file of what they are.

python -m liftplace_jax.data.make_emoji FONT NAMES [--output DIR]

FONT is NotoColorEmoji.ttf with bitmaps (CBDT), as Debian 12's package fonts-noto-color-emoji
2.042-0+deb12u1 has it; NAMES is en/data.json of the npm package emojibase-data 17.0.0, whose names
are Unicode CLDR's. The same files and the same Pillow give the same bytes, in half a minute.

Left out, and counted: what the font has no picture of, letters of flags (no group), and a second
name of a picture that is there already, such as flags that several territories share.
"""

import argparse
import json
import os
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from liftplace_jax.data.emoji import COLUMNS, FIELDS, SHEET, SIZE, TABLE

STRIKE = 109  # the one size of the font's bitmaps, in pixels a em
BITMAP = (136, 128)
UNKNOWN = "\U0010ffff"  # drawn as the font draws what it does not have


def read_names(path):
    """All emoji in CLDR's order: dicts of "emoji", "name", "group" (or None), "keywords"."""
    found = []
    for entry in json.loads(Path(path).read_text(encoding="utf-8")):
        for item in (entry, *entry.get("skins", ())):
            found.append(
                {
                    "emoji": item["emoji"],
                    "name": item["label"],
                    "group": item.get("group"),
                    "subgroup": item.get("subgroup"),
                    "keywords": [tag.strip() for tag in entry.get("tags", ())],
                    "order": item.get("order", 0),
                }
            )
    return sorted(found, key=lambda item: item["order"])


def draw(font, text):
    """(SIZE, SIZE) RGB on white, or None if the font has no one picture of the text."""
    if font.getlength(text) != font.getlength(UNKNOWN):
        return None  # several pictures beside each other
    ground = Image.new("RGB", (BITMAP[0], BITMAP[0]), "white")
    place = (0, (BITMAP[0] - BITMAP[1]) // 2)
    ImageDraw.Draw(ground).text(place, text, font=font, embedded_color=True)
    # Pillow averages over what a pixel covers.
    return ground.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def draw_all(font, names):
    """(pictures, their entries, Counter of what was left out, in words)."""
    blank = draw(font, UNKNOWN)
    assert blank is not None, "every font draws what it does not have"
    unknown, seen = blank.tobytes(), set()
    pictures, kept, left_out = [], [], Counter()
    for item in names:
        picture = draw(font, item["emoji"])
        if item["group"] is None:
            left_out["of no group"] += 1
        elif picture is None or picture.tobytes() == unknown:
            left_out["not in the font"] += 1
        elif picture.tobytes() in seen:
            left_out["the same picture as an earlier one"] += 1
        else:
            seen.add(picture.tobytes())
            pictures.append(picture)
            kept.append(item)
    return pictures, kept, left_out


def write(pictures, kept, folder):
    """Writes the sheet and the table, each whole or not at all."""
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIZE, rows * SIZE), "white")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, COLUMNS)
        sheet.paste(picture, (column * SIZE, row * SIZE))
    temporary = folder / f"{SHEET}.tmp"
    sheet.save(temporary, format="PNG", optimize=True)
    os.replace(temporary, folder / SHEET)
    rows = (
        [item["emoji"], item["name"], item["group"], item["subgroup"], item["keywords"]]
        for item in kept
    )
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
    temporary = folder / f"{TABLE}.tmp"
    temporary.write_text(f"[{json.dumps(FIELDS)},\n{lines}]\n", encoding="utf-8")
    os.replace(temporary, folder / TABLE)


def main(argv=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("font", type=Path, help="NotoColorEmoji.ttf")
    parser.add_argument("names", type=Path, help="en/data.json of emojibase-data")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, help="folder to write to"
    )
    args = parser.parse_args(argv)
    if not features.check("raqm"):
        parser.error("this Pillow has no raqm, without which sequences of characters fall apart")
    font = ImageFont.truetype(args.font, STRIKE)
    pictures, kept, left_out = draw_all(font, read_names(args.names))
    write(pictures, kept, args.output)
    said = ", ".join(f"{number:,} {why}" for why, number in sorted(left_out.items()))
    print(f"{args.output}: {len(kept):,} pictures; left out: {said}")


if __name__ == "__main__":
    main()
