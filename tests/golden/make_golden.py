r"""Write golden.json: what the official COCO caption evaluation makes of the captions below.

    python tests/golden/make_golden.py --oracle_python PATH --shared DIR

The captions are of our own making; of the data sets in DIR, only the hash of their tokens is kept. PATH is
the interpreter of an environment with pycocoevalcap; Java is needed too.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import oracle

GOLDEN = Path(__file__).with_name("golden.json")

# One batch, in this order: what follows a caption can matter. No line breaks but "\n", see ptb.tokenize.
CAPTIONS = [
    # Contractions, clitics and assimilations.
    "The woman's dog isn't wet, but the dogs' toys aren't dry.",
    "I'm sure they'll say we've seen what you're after; he'd agree, she'd not.",
    "They can't, won't, couldn't've, shan't and ain't. DON'T! don`t don\u2019t",
    "You cannot do it, I'm gonna try, we gotta go, lemme see, gimme that, wanna bet? Cannot GONNA",
    "'Tis a barn that 'twas red; 'til then, 'cause of 'em, rock 'n' roll.",
    "y'all ain't seen o'clock, O'Neil, d'Avignon, l'eau, c'est, Cap'n, nor'easter, c'mon, ol' boy, somethin'",
    "It's the '90s and the 1990's, class of '99, five o'clock",
    "James' hat, the boss's hat, and a cat's",
    # Quotes.
    'A sign says "STOP" and another "Go slow".',
    "A 'quoted' word, `odd' ones, ``latex'' ones and '' empty ones",
    "\u201cCurly\u201d and \u2018single\u2019 and \u00abguillemets\u00bb and \u201elow\u201c ones\u2026",
    "a 'a' 'I' 'bc' \"d\" \"$5\" \"-\"",
    "Mixed `` '' ` ' \u00b4 \u2032 \u2033",
    # Brackets.
    "A man (left) and [right] {middle} <here> (and (nested)) .",
    "-LRB- typed -RRB- out -lcb- -RSB- in -Lrb- odd case",
    # Stops, dashes and ellipses.
    "Wait... what.. is.... that..... here...... now . . . and . . . . then",
    "a - b -- c --- d ---- e ----- f \u2013 g \u2014 h \u2015 i &mdash; j &ndash; k",
    "well-known rock-n-roll T-shirt x-ray twenty-one 3-year-old co-op, self- -made a-b-c. pro-life anti-war",
    "Stop! Really?! Wow!!! what??? one!two one?two end.Then e.g.This",
    "semi;colon co:lon com,ma 12:30, 1,000; 1,2,3 a,b",
    # Abbreviations.
    "Mr. Brown, Mrs. Green and Dr. Who on Main St. near Mt. Hood, St. Louis, Mo.",
    "Foo Inc. and Bar Co. Ltd. of Calif. in Jan. vs. the U.S. Army, etc.",
    "at 5 p.m. or 6 a.m. at 7 P.M. The U.S. The U.K. team, U.S.A., e.g. this, i.e. that",
    "Ph.D. student, Jr. and Sr., Gen. Lee, Sgt. Pepper, Capt. Ahab, Rev. X, a.k.a. Y.",
    "approx. 5, no. 7, No. one, nos. 1-3",
    "fig. 3 and figs. 4, pp. 5, ca. 1900, art. 6, op. 7, est. 1901, tel. 555, sq. ft. 12",
    "She got an A. The next row",
    "begins with The, so that the A. above is two tokens. Row B.",
    "row c.",
    "He lives on Elm St.",
    "10 people vote yes or no.",
    "2 people look on",
    # Numbers, money and times.
    "1 2,000 3.14 .5 -6 +7 1/2 1 1/2 2-1/2 3/4-inch",
    "\u00bd \u00bc cup \u2153 \u215b 10% 5' 6\" 7\u00b0 x\u00b2 H\u2082O 1st 22nd",
    "$5 $5.00 US$6 A$7 \u00a38 \u20ac9 \u00a510 11\u00a2 #1 # 2 \u20b912 \u20a413",
    "12:30pm 5pm 5 pm 24/7 12/25/2014 25-12-2014 2014-12-25 50/50 747-400 10x10 4K 3D",
    "Call 555-1234, (555) 123-4567, 555-123-4567, 555.123.4567, +1 555 123 4567 or 1-800-555-1234 now",
    "and/or AC/DC w/ w/o c/o his/her/its a/b/c/d / // \\ \\/ 1\\/2",
    # The web.
    "See http://example.com/a?b=c&d=e, https://example.org. www.example.com/x example.net example.edu/y.",
    "Mail me@example.com or <first.last@mail.example.co.uk> now, @name, @name's, @ home #tag #2 #a_b #tag's",
    "photo.jpg, index.html. a.tar.gz IMG_001.JPG file.txt? notes.docx",
    '<b>bold</b> <br/> <a href="x y">link</a> <!-- note --> <unk> <start> a<b c>d 1 < 2 > 1 << >>',
    "&amp; &lt; &gt; &quot;hi&quot; &apos;s &nbsp; caf&eacute; &copy; AT&amp;T AT&T R&D",
    "S&P-500 Q&A B&amp;B & co",
    ":) :-) :( ;) :D =) :P :| <3 ^_^ -_- (^_^) x_x o_O :'( xD 8) \u00af\\_(\u30c4)_/\u00af",
    # Other characters.
    "caf\u00e9 na\u00efve \u00dcber stra\u00dfe \u00d1and\u00fa \u0130stanbul \u017fo \u212a",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u65e5\u672c\u8a9e",
    "\ud55c\uad6d\uc5b4 \u0639\u0631\u0628\u064a \u05e2\u05d1\u05e8 \u0939\u093f\u0928\u094d\u0926\u0940",
    "e\u0301te\u0301 soft\u00adhyphen zero\u200bwidth no\u00a0break thin\u2009space wide\u3000space",
    "\u00ad \ufeff",
    "emoji \U0001f600 \U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1fa\U0001f1f8",
    "\u2764\ufe0f \u263a \u2122 \u00ae \u00a9 \u00a7 \u2022 \u00d7 \u00f7 \u00b1 x\U0001f600y",
    "tabs\tand\nnew lines\n\nand  double   spaces ",
    "control \x01 \x1f \x7f \x00 chars \x85 \x91cp\x92 \x93cp\x94 \x96 \x97 \x80",
    "* ** *** x*y \\* = == a=b | ~ ~5 ^ _ __ a_b snake_case c++ C# f# + a+b A+B % \u221e \u2192 \u2260",
    "",
    " ",
    ".",
    "...",
    "?!",
    " ".join(["a very long caption of a street with cars,"] * 40),
]

# Each is a batch of its own: the end of the text counts too.
ALONE = [
    "dogs, cats, etc.",
    "etc.5",
    "in Jan. ",
    "Grade A. The",
    "It's",
    "don't",
    "no. 3",
    "a photo.jpg",
    ":)",
    "'90",
]

_FIVE = {
    "dog": [
        "A brown dog is running through shallow water.",
        "The dog runs along the edge of a lake.",
        "A wet dog splashes in the water.",
        "A dog that is brown runs in a pond, splashing.",
        "Dog running in water",
    ],
    "kitchen": [
        "A small kitchen with white cabinets and a window.",
        "A kitchen that's clean, with a stove (gas) and a sink.",
        "White cabinets line the wall of this small kitchen.",
        "There is a window above the sink in the kitchen.",
        "A sunny kitchen.",
    ],
    "tennis": [
        "A woman in a white skirt swings a tennis racket.",
        "A tennis player hits the ball with her racket.",
        "A woman is playing tennis on a court.",
        "A player's about to hit a tennis ball.",
        "The woman swings a racket at a ball.",
    ],
    "bus": [
        "A red double-decker bus drives down a street.",
        "The bus is red and has two decks.",
        "A red bus on a busy street in the city",
        "A double-decker bus passes a row of shops.",
        "A bus, bright red, on a road.",
    ],
    "cake": [
        "A chocolate cake with 3 candles on a plate.",
        "A birthday cake that has three lit candles.",
        "Someone's birthday cake, with candles, on a table.",
        "A slice of cake sits next to a whole cake.",
        "cake",
    ],
    "train": [
        "A train pulls into the station.",
        "A blue train is at a platform.",
        "People wait while a train arrives at a station.",
        "The train at platform no. 9 is blue.",
        "A train on the tracks near a platform",
    ],
    "cat": [
        "A cat sleeps on a laptop keyboard.",
        "A grey cat is lying on a computer.",
        "The cat is asleep on top of a laptop.",
        "A cat can't stop sleeping on the keyboard",
        "A laptop with a cat on it.",
    ],
    "surfer": [
        "A surfer rides a large wave.",
        "A man on a surfboard in the ocean",
        "A man is surfing a big wave in the sea.",
        "The surfer is riding a wave.",
        "Man surfing.",
    ],
    "giraffes": [
        "Two giraffes stand next to a tree.",
        "A pair of giraffes eating leaves from a tall tree.",
        "Two giraffes are eating from a tree in a field.",
        "Giraffes near a tree",
        "There are two giraffes in the grass.",
    ],
    "sign": [
        'A stop sign says "STOP" in white letters.',
        "A red stop sign on the corner of a street.",
        "The sign at the corner of Elm St. and 5th Ave. says stop.",
        "A stop sign!",
        "A street sign above a stop sign.",
    ],
}
_PREDICTED = [
    "a brown dog runs in the water",
    "A small kitchen with white cabinets and a window.",
    "a woman woman woman playing tennis tennis",
    "",
    "cake",
    "station the into pulls train a",
    "a giraffe rides a wave in a kitchen with a cake and a bus on a very long street",
    "a man riding a wave on a surfboard in the ocean",
    "two giraffes",
    "a red stop sign on the side of the road",
]
SETS = {
    "one image": (_PREDICTED[:1], list(_FIVE.values())[:1]),
    "two images": (_PREDICTED[:2], list(_FIVE.values())[:2]),
    "ten images": (_PREDICTED, list(_FIVE.values())),
    "uneven references": (
        [_PREDICTED[0], *_PREDICTED[2:5]],
        [captions[: k + 1] for k, captions in enumerate(list(_FIVE.values())[:4])],
    ),
    "all empty": (["", ""], [["A dog."], ["A cat on a mat."]]),
    "only punctuation": (["...", "a dog"], [["A dog.", "!"], ["-", "a dog"]]),
    "identical": (
        [captions[0] for captions in _FIVE.values()],
        [captions[:1] for captions in _FIVE.values()],
    ),
}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--oracle_python", default=sys.executable)
    parser.add_argument("--shared", type=Path, required=True, help="folder with the data sets, see below")
    args = parser.parse_args(argv)

    datasets = read_datasets(args.shared)
    jobs = [{"predictions": [], "references": [[c] for c in captions]} for captions in datasets.values()]
    jobs += [{"predictions": [], "references": [[caption] for caption in CAPTIONS]}]
    jobs += [{"predictions": [], "references": [[caption]]} for caption in ALONE]
    jobs += [{"predictions": predictions, "references": references} for predictions, references in SETS.values()]
    results = iter(oracle.run(jobs, args.oracle_python))

    hashes = {}
    for name, captions in datasets.items():
        tokens = [tokens for (tokens,) in next(results)["references"]]
        hashes[name] = {"captions": len(captions), "sha256": token_hash(tokens)}
    tokens = [tokens for (tokens,) in next(results)["references"]]
    alone = [next(results)["references"][0][0] for _ in ALONE]
    sets = {}
    for name, (predictions, references) in SETS.items():
        result = next(results)
        sets[name] = {
            "predictions": predictions,
            "references": references,
            "scores": result["scores"],
            "per_image": result["per_image"],
        }
    golden = {
        "made with": "pycocoevalcap 1.2, stanford-corenlp-3.4.1, by make_golden.py",
        "datasets": hashes,
        "tokens": list(map(list, zip(CAPTIONS, tokens, strict=True))),
        "alone": list(map(list, zip(ALONE, alone, strict=True))),
        "sets": sets,
    }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


def read_datasets(shared: Path) -> dict[str, list[str]]:
    """{file: all of its captions, in its order} of the data sets that there are."""
    found = {}
    for name in (
        "coco2014/annotations/captions_train2014.json",
        "coco2014/annotations/captions_val2014.json",
        "coco2014/dataset_coco.json",
        "flickr8k/dataset_flickr8k.json",
        "captions_val2017.json",
    ):
        if (shared / name).exists():
            data = json.loads((shared / name).read_text())
            if "annotations" in data:
                found[name] = [annotation["caption"] for annotation in data["annotations"]]
            else:  # the Karpathy format
                found[name] = [s["raw"] for image in data["images"] for s in image["sentences"]]
    return found


def token_hash(tokens: list[str]) -> str:
    return hashlib.sha256("\n".join(tokens).encode()).hexdigest()


if __name__ == "__main__":
    main()
