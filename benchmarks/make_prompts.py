"""Writes prompts.json: the inputs of every benchmark, fixed by a seed.

    python benchmarks/make_prompts.py CHECKPOINT ENCODER_FOLDER

decode: 32 prompts of 16 to 64 token ids, the lengths spread evenly. prefill: one of 512. words: each is a token of the
encoder's vocabulary, so that a text of n words has n + 2 tokens.
"""

import argparse
import json
import random
from pathlib import Path

from jaxinfer.checkpoints import open_checkpoint

SENTENCES = """\
The harbour was quiet when the first boats came in, and the men spoke little as they unloaded the night's catch.
A compiler reads a program twice: once to learn what it says, and once to find out what it could have said in less time.
Please explain to a ten year old why the sky is blue during the day but turns red and orange in the evening.
In 1869 the railway reached the valley, and within ten years the village had become a town of four thousand people.
Mix the flour with the butter and a pinch of salt, add cold water by the spoon, and let the dough rest for half an hour.
The committee could not agree on a date, so the meeting was moved to the second Thursday of the following month.
What are three differences between a list and a tuple, and when should I prefer one over the other?
Migrating birds find their way by the stars, by the sun's position, and by a sense of the earth's magnetic field.
She had kept every letter he sent her, tied with a blue ribbon, in a tin box on the highest shelf of the pantry.
The experiment was repeated with twelve samples, and the average temperature differed by less than half a degree.
Write a short and friendly email to a colleague who has been ill, saying that there is no hurry about the report.
Prices rose faster than wages for the third year in a row, which surprised those who had predicted the opposite.
The function returns the largest element of the array, or raises an error if the array has no elements at all.
When the snow melts the river floods the lower meadows, and the cattle are driven up to the pastures on the hill.
List the planets of the solar system in order of their distance from the sun, with one fact about each of them.
The old theatre had been a cinema, then a warehouse, and for one summer a place where people learned to dance.
"""

WORDS = """\
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name president team minute idea body information back parent face others
level office door health person art war history party result change morning reason research girl guy moment air teacher
force education
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    sentences, words = SENTENCES.splitlines(), WORDS.split()
    tokenizer = open_checkpoint(args.checkpoint).load_tokenizer()
    vocabulary = set((args.encoder / "vocab.txt").read_text(encoding="utf-8").split("\n"))
    assert tokenizer is not None and vocabulary.issuperset(words)

    def prompt(length: int) -> list[int]:
        text = " ".join(draw.choice(sentences) for _ in range(length // 8 + 1))
        return tokenizer.encode(text, add_special=False)[:length]

    lengths = [16 + round(48 * i / 31) for i in range(32)]
    draw.shuffle(lengths)
    decode, prefill = [prompt(length) for length in lengths], prompt(512)
    assert [len(ids) for ids in decode] == lengths and len(prefill) == 512
    rows = ",\n    ".join(json.dumps(ids) for ids in decode)
    prefill, words = json.dumps(prefill), json.dumps(words)
    text = f'{{\n  "decode": [\n    {rows}\n  ],\n  "prefill": {prefill},\n  "words": {words}\n}}\n'
    (Path(__file__).parent / "prompts.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
