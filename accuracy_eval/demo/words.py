"""The words of the demo's tasks, and the one rule that turns words into text and back."""

import re

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"

WORD_PATTERN = r"\w+|[^\w\s]"
_WORD = re.compile(WORD_PATTERN)


def to_words(text: str) -> list[str]:
    """Split text into words and punctuation marks; white space is dropped."""
    return _WORD.findall(text)


def to_text(words: list[str]) -> str:
    """Spell words: a space between words, none before punctuation."""
    return "".join(f" {word}" if word[0].isalnum() else word for word in words).strip()


_ONSETS = (
    "Bar Cor Dal Fen Gar Hol Jas Kel Lor Mar Nor Pel Quin Ras Sel Tam Ul Ver Wil Yor Zan Bel Cas Dor".split()
)
_ENDINGS = "lin da vik mor ta ris ko bert na wen dis lo mund ra sen ti vard ya zel mi gar pen".split()
PERSONS = [onset + ending for onset in _ONSETS for ending in _ENDINGS]

PLACE_NOUNS = """
tower cellar chapel market bridge stable library garden kitchen attic bakery mill harbor castle
cottage temple tavern museum theater station workshop barn palace tunnel lighthouse courtyard
orchard vineyard quarry monastery warehouse school hospital bank prison forge greenhouse pavilion
arsenal granary observatory archive cathedral fortress gallery hall hut inn lodge manor mine mint
nursery office pantry pier shed shop shrine studio tannery vault villa well
""".split()

OBJECTS = """
rope lantern map compass ladder barrel basket blanket bottle bucket candle carpet chest coin crown
cup dagger drum feather flag goblet helmet horn jar kettle key letter lock mirror necklace needle
paddle parcel pillow pipe plate purse ring saddle sail scroll seal shield shovel spoon stamp statue
sword telescope tent thimble torch trophy umbrella urn vase violin whistle wreath
""".split()

DEEDS = (
    "repaired sold bought painted cleaned carried borrowed counted wrapped polished dropped weighed".split()
)

CATEGORIES = {
    "animal": "badger otter falcon beaver weasel heron lizard rabbit pigeon donkey hedgehog salmon",
    "fruit": "apple pear plum cherry lemon melon peach apricot grape fig mango papaya",
    "tool": "hammer wrench chisel pliers drill anvil hatchet mallet screwdriver sickle trowel crowbar",
    "garment": "jacket scarf glove sweater trousers apron cloak sock vest mitten robe bonnet",
    "vehicle": "wagon canoe tractor bicycle ferry sledge tram scooter truck barge chariot minibus",
    "instrument": "flute trumpet cello banjo oboe harp clarinet accordion trombone mandolin piccolo zither",
    "tree": "oak birch willow maple cedar spruce poplar alder larch beech chestnut sycamore",
    "dish": "soup stew omelet pancake dumpling porridge casserole lasagna pie salad sandwich risotto",
    "profession": "tailor baker plumber surgeon carpenter lawyer pilot butcher teacher mason clerk sailor",
    "metal": "iron tin zinc nickel cobalt chromium titanium platinum tungsten lead mercury bismuth",
    "furniture": "sofa wardrobe desk bench cupboard stool armchair bookcase cradle dresser mattress bureau",
    "spice": "pepper cinnamon ginger saffron clove nutmeg cumin turmeric paprika cardamom anise thyme",
    "weather": "drizzle blizzard hail fog thunder sleet hurricane frost breeze downpour tornado drought",
    "gem": "ruby emerald sapphire topaz garnet opal agate pearl diamond turquoise onyx quartz",
    "sport": "tennis rugby fencing archery cricket hockey rowing judo golf cycling wrestling badminton",
    "cloth": "linen velvet satin denim wool flannel corduroy cashmere muslin felt tweed nylon",
}
CATEGORY_WORDS = {name: words.split() for name, words in CATEGORIES.items()}

LABELS = """
alpha beta gamma delta epsilon zeta theta kappa lambda omega sigma tau orchid lotus tulip violet
daisy lily iris jasmine comet planet meteor galaxy nebula eclipse lagoon ocean glacier canyon desert
volcano
""".split()

FILLER_SUBJECTS = """
wind rain clouds crowd children visitors farmers travelers horses sheep birds leaves waves bells
lamps shadows smoke snow dust sunlight
""".split()
FILLER_VERBS = """
drifted moved gathered rested waited appeared settled lingered wandered returned faded passed
""".split()
FILLER_SPOTS = """
hills fields road river valley roofs fence meadow gate shore forest path square wall pond slope
ditch hedge steps lane
""".split()
