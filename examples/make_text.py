"""Writes text.txt: our own sentences, joined by a small seeded grammar. `python examples/make_text.py > examples/text.txt`."""

import random

WHO = "the bursar|the old clerk|a young apprentice|the miller|the ferryman|the keeper of the college|a travelling teacher|the night porter|the gardener|the bell ringer|the careful cook|the widow at the gate".split("|")
DID = "counted|wrote down|weighed|carried away|mended|sold|forgot|found again|put in order|paid for|asked about|hid".split("|")
WHAT = "the candles|seven sacks of flour|the silver spoons|a barrel of salt|the winter coal|the rent of the mill|an unpaid bill|the keys of the cellar|three bottles of ink|the bread for the hall|a borrowed book|the tallest ladder".split("|")
WHERE = "by the river|in the long hall|under the stairs|behind the chapel|at the market|in the counting room|on the wet steps|near the south gate".split("|")
WHEN = "before sunrise|after the bell|on a cold Monday|late in the autumn|when the rain had stopped|at the end of the quarter|while the others slept|on the longest day".split("|")
WHY = "because nobody else had done it|for the sums would not agree|since the ledger lay open|so that nothing would be lost|although nobody had asked|for the winter would be long".split("|")
SAID = "A page that balances is a good night's sleep|What is not written down has not been paid|Count twice and speak once|A small debt grows like ivy|The left side must know what the right side does|Every line has a reason, or it has no business here".split("|")


def sentence(pick: random.Random) -> str:
    """One sentence of five shapes."""
    who, did, what, where, when, why, said = (pick.choice(x) for x in (WHO, DID, WHAT, WHERE, WHEN, WHY, SAID))
    shapes = (
        f"{when}, {who} {did} {what} {where}.",
        f"{who} {did} {what}, {why}.",
        f"{where}, {when}, {who} {did} {what}.",
        f'"{said}," said {who}, and {did} {what} {when}.',
        f"{who} {did} {what} and {pick.choice(DID)} {pick.choice(WHAT)} {where}, {why}.",
    )
    text = pick.choice(shapes)
    at = 1 if text[0] == '"' else 0
    return text[:at] + text[at].upper() + text[at + 1 :]


if __name__ == "__main__":
    pick = random.Random(10)
    print("This text was written for bursar: original sentences, joined by the seeded grammar of make_text.py. Free to use.")
    for _ in range(160):
        print("\n" + " ".join(sentence(pick) for _ in range(pick.randint(4, 8))))
