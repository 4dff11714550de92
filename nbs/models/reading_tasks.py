"""Texts with questions that only the text answers, made for the training of `llmopt-tiny`.

A model this small, trained on plain text, hardly looks at a passage before a question. These tasks make it look. The
answer stands in the prompt, in other words or among others like it, and differs from document to document, so it cannot
be learned by heart. Four kinds:

- `facts`: invented people, places and things with random properties, told in one wording and asked in another;
- `recall`: lists of keys and values in many layouts;
- `extract`: real passages of the training text: find the sentence that speaks of something, go on where it was cut, or
  fill a gap;
- `choose`: the answers to several questions, shuffled into one text, of which some are asked.

Everything is drawn from a seed: `r` is a `random.Random` throughout. `llmopt_tiny.py data` calls `tasks`.
"""

import itertools
import random
import re

# ---- invented names and values
ONSET, NUCLEUS, CODA = (
    "b br c d dr f g gl h j k l m n p pr r s st t th tr v w z".split(),
    "a e i o u ai ea o u a e".split(),
    ["", "", "", "l", "n", "r", "s", "m", "x", "nd", "rk", "th"],
)


def name(r, parts=(2, 3)):
    "An invented name of some syllables."
    return "".join(
        r.choice(ONSET) + r.choice(NUCLEUS) + (r.choice(CODA) if r.random() < 0.5 else "")
        for _ in range(r.randint(*parts))
    ).capitalize()


FIRST = """
Anna Ben Clara David Elena Farid Grace Hugo Ines Jonas Kim Lena Marco Nadia Omar Paula Quinn Rosa Samir Tara
Uma Victor Wanda Xenia Yusuf Zoe Peter Maria Aisha Carlos Mei Ivan Sofia Tom Ruth Leo Nora Amir Julia Felix
Hana Oscar Priya Erik
""".split()


def person(r):
    "A first name and an invented family name."
    return f"{r.choice(FIRST)} {name(r, (2, 2))}"


def number(r):
    "A number from 2 to 900,000, mostly with a comma for thousands."
    x = r.choice(
        [
            r.randint(2, 99),
            r.randint(100, 999),
            r.randint(1, 99) * 100,
            r.randint(1000, 9999),
            r.randint(10, 900) * 1000,
        ]
    )
    return f"{x:,}" if x > 9999 or r.random() < 0.5 else str(x)


def small(r):
    "A small number, in digits or in words."
    return r.choice(
        [
            str(r.randint(2, 60)),
            r.choice("two three four five six seven eight nine ten twelve fifteen twenty thirty".split()),
        ]
    )


def year(r):
    "A year from 1640 on."
    return str(r.randint(1640, 2024))


def month(r):
    "A month."
    return r.choice("January February March April May June July August September October November December".split())


def one(words):
    "A function that draws one of `words`."
    return lambda r: r.choice(words)


def words(text):
    "A function that draws one of the phrases in `text`, which commas set apart."
    return one([w.strip() for w in text.split(",")])


JOB = words(
    "a baker, a nurse, a carpenter, a teacher, a pilot, a chemist, a farmer, a judge, a painter, a sailor, an "
    "engineer, a gardener, a writer, a musician, a doctor, a clockmaker, a librarian, a photographer, a "
    "geologist, a programmer, a miner, a translator, a beekeeper, an actor"
)
COLOR = words(
    "red, blue, green, yellow, white, black, grey, brown, orange, purple, silver, golden, dark green, pale blue"
)
FOOD = words(
    "bread, cheese, apples, rice, honey, fish, soup, olives, mushrooms, potatoes, nuts, berries, beans, seeds, "
    "leaves, insects, grass, small crabs, snails, roots"
)
PLACE = words(
    "the north coast, the old harbour, a valley, the edge of the desert, a small island, the foot of a hill, the "
    "western plain, the lake shore, a pine forest, the high mountains, the river mouth, a quiet bay"
)
STUFF = words(
    "copper, iron, wood, clay, glass, steel, silk, wool, stone, paper, bronze, cotton, leather, bamboo, granite, "
    "tin, salt, amber"
)
TOPIC = words(
    "the stars, old maps, sea birds, bridges, rare plants, music, volcanoes, trade routes, deep lakes, the brain, "
    "clouds, ancient coins, bees, machines, glaciers, poems, trains, medicine, soil, languages"
)
SENSE = words(
    "the weather, earthquakes, traffic, water quality, the heartbeat, air pollution, ships, wind, forest fires, "
    "machine faults, sleep, crop growth, temperature, noise"
)
DAY = words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
ANIMAL = words("dog, cat, horse, goat, parrot, turtle, donkey, rabbit, crow, sheep")

HOUSES = "Project Museum Bridge Library School Theatre Hospital Observatory Station Company".split()

# Kind: name, then relations: (value, sentences, questions, answers); {n} is the name, {v} the value.
KINDS = {
    "town": (
        name,
        [
            (
                number,
                ["{n} has {v} inhabitants.", "About {v} people live in {n}.", "The population of {n} is {v}."],
                ["How many people live in {n}?", "What is the population of {n}?", "How large is {n}?"],
                ["{v} people live in {n}.", "{v}."],
            ),
            (
                year,
                ["{n} was founded in {v}.", "The town goes back to {v}, when the first houses of {n} were built."],
                ["When was {n} founded?", "In which year was {n} founded?", "How old is the town of {n}?"],
                ["{n} was founded in {v}.", "In {v}."],
            ),
            (
                PLACE,
                ["{n} lies on {v}.", "The town of {n} stands at {v}."],
                ["Where is {n}?", "Where does {n} lie?"],
                ["{n} lies on {v}.", "On {v}."],
            ),
            (
                person,
                ["The mayor of {n} is {v}.", "{v} was elected mayor of {n}."],
                ["Who is the mayor of {n}?", "Who governs {n}?"],
                ["The mayor of {n} is {v}.", "{v}."],
            ),
            (
                STUFF,
                ["{n} is known for its {v}.", "Craftsmen in {n} work with {v}."],
                ["What is {n} known for?", "What do craftsmen in {n} work with?"],
                ["{n} is known for its {v}.", "{v}."],
            ),
            (
                name,
                ["The river {v} flows through {n}.", "{n} stands on the river {v}."],
                ["Which river flows through {n}?", "On which river does {n} stand?"],
                ["The river {v} flows through {n}.", "The {v}."],
            ),
            (
                DAY,
                ["The market of {n} is held on {v}.", "Every {v}, farmers sell their goods in {n}."],
                ["When is the market of {n}?", "On which day can one buy goods from farmers in {n}?"],
                ["The market is held on {v}.", "On {v}."],
            ),
        ],
    ),
    "person": (
        person,
        [
            (
                JOB,
                ["{n} works as {v}.", "{n} is {v}.", "For many years {n} has been {v}."],
                ["What does {n} do?", "What is the job of {n}?", "What does {n} do for a living?"],
                ["{n} is {v}.", "{v}."],
            ),
            (
                year,
                ["{n} was born in {v}.", "Born in {v}, {n} grew up with two sisters."],
                ["When was {n} born?", "In which year was {n} born?"],
                ["{n} was born in {v}.", "In {v}."],
            ),
            (
                name,
                ["{n} lives in {v}.", "The home of {n} is in {v}."],
                ["Where does {n} live?", "In which town is the home of {n}?"],
                ["{n} lives in {v}.", "In {v}."],
            ),
            (
                TOPIC,
                ["{n} studies {v}.", "In the evenings {n} reads about {v}.", "What interests {n} most is {v}."],
                ["What does {n} study?", "What is {n} interested in?"],
                ["{n} is interested in {v}.", "{v}."],
            ),
            (
                FOOD,
                ["{n} likes to eat {v}.", "The favourite food of {n} is {v}."],
                ["What does {n} like to eat?", "What is the favourite food of {n}?"],
                ["{n} likes to eat {v}.", "{v}."],
            ),
            (
                ANIMAL,
                ["{n} owns a {v}.", "A {v} belongs to {n}."],
                ["Which animal does {n} own?", "Which animal belongs to {n}?"],
                ["{n} owns a {v}.", "A {v}."],
            ),
            (
                person,
                ["{n} is married to {v}.", "{v} is the partner of {n}."],
                ["Who is {n} married to?", "Who is the partner of {n}?"],
                ["{n} is married to {v}.", "{v}."],
            ),
        ],
    ),
    "device": (
        lambda r: name(r) + r.choice(["", f"-{r.randint(2, 900)}", f" {r.choice('ABCDEGKMX')}{r.randint(1, 9)}"]),
        [
            (
                SENSE,
                ["The {n} is a sensor for {v}.", "Engineers built the {n} to watch {v}."],
                ["What does the {n} measure?", "What is the {n} for?", "What was the {n} built to watch?"],
                ["The {n} watches {v}.", "{v}."],
            ),
            (
                lambda r: (
                    f"{number(r)} {r.choice(['watts', 'grams', 'kilograms', 'volts', 'hours', 'metres', 'litres'])}"
                ),
                ["Its main figure is {v}, which is what the {n} needs.", "The {n} needs {v}."],
                ["How much does the {n} need?", "What does the {n} need?"],
                ["The {n} needs {v}.", "{v}."],
            ),
            (
                STUFF,
                ["The case of the {n} is made of {v}.", "The {n} has a shell of {v}."],
                ["What is the {n} made of?", "What is the case of the {n} made of?"],
                ["It is made of {v}.", "{v}."],
            ),
            (
                name,
                ["The {n} is made by a company called {v}.", "A firm named {v} sells the {n}."],
                ["Who makes the {n}?", "Which company sells the {n}?"],
                ["The {n} is made by {v}.", "{v}."],
            ),
            (
                lambda r: f"{small(r)} {r.choice(['minutes', 'hours', 'days', 'weeks', 'years'])}",
                ["The battery of the {n} lasts {v}.", "After {v} the battery of the {n} is empty."],
                ["How long does the battery of the {n} last?", "When is the battery of the {n} empty?"],
                ["The battery lasts {v}.", "{v}."],
            ),
            (
                number,
                ["The {n} costs {v} coins.", "Whoever wants to buy the {n} pays {v} coins."],
                ["How much does the {n} cost?", "What is the price of the {n}?"],
                ["The {n} costs {v} coins.", "{v} coins."],
            ),
        ],
    ),
    "animal": (
        lambda r: name(r).lower(),
        [
            (
                FOOD,
                ["The {n} eats mostly {v}.", "The diet of the {n} consists of {v}."],
                ["What does the {n} eat?", "What does the {n} live on?"],
                ["The {n} eats {v}.", "{v}."],
            ),
            (
                PLACE,
                ["The {n} is found near {v}.", "Wild herds of the {n} live around {v}."],
                ["Where does the {n} live?", "Where is the {n} found?"],
                ["The {n} lives near {v}.", "Near {v}."],
            ),
            (
                COLOR,
                ["The fur of the {n} is {v}.", "An adult {n} is {v}."],
                ["What colour is the {n}?", "What is the colour of the fur of the {n}?"],
                ["The {n} is {v}.", "{v}."],
            ),
            (
                lambda r: f"{small(r)} years",
                ["A {n} lives for about {v}.", "The {n} can reach an age of {v}."],
                ["How long does a {n} live?", "How old can the {n} become?"],
                ["It lives for about {v}.", "{v}."],
            ),
            (
                month,
                ["The young of the {n} are born in {v}.", "Every {v} the {n} has its young."],
                ["When are the young of the {n} born?", "In which month does the {n} have its young?"],
                ["In {v}.", "The young are born in {v}."],
            ),
            (
                lambda r: f"{number(r)} grams",
                ["A grown {n} weighs {v}.", "The weight of a {n} is about {v}."],
                ["How heavy is the {n}?", "What does a {n} weigh?"],
                ["A {n} weighs {v}.", "{v}."],
            ),
        ],
    ),
    "project": (
        lambda r: f"{name(r)} {r.choice(HOUSES)}",
        [
            (
                year,
                ["The {n} opened in {v}.", "Since {v} the {n} has been open to all."],
                ["When did the {n} open?", "Since when has the {n} been open?"],
                ["The {n} opened in {v}.", "In {v}."],
            ),
            (
                person,
                ["The {n} is led by {v}.", "{v} has directed the {n} for a long time."],
                ["Who leads the {n}?", "Who directs the {n}?", "Who is the head of the {n}?"],
                ["The {n} is led by {v}.", "{v}."],
            ),
            (
                number,
                ["The {n} employs {v} people.", "There are {v} workers at the {n}."],
                ["How many people work at the {n}?", "How many workers does the {n} have?"],
                ["{v} people work there.", "{v}."],
            ),
            (
                TOPIC,
                ["The {n} deals with {v}.", "Visitors of the {n} learn about {v}."],
                ["What is the {n} about?", "What can one learn about at the {n}?"],
                ["It deals with {v}.", "{v}."],
            ),
            (
                STUFF,
                ["The roof of the {n} is made of {v}.", "Builders used {v} for the walls of the {n}."],
                ["What is the {n} built of?", "What did builders use for the {n}?"],
                ["It was built of {v}.", "{v}."],
            ),
            (
                DAY,
                ["The {n} is closed on {v}.", "Nobody works at the {n} on {v}."],
                ["When is the {n} closed?", "On which day is the {n} closed?"],
                ["It is closed on {v}.", "On {v}."],
            ),
        ],
    ),
}
LINK = [""] * 14 + ["Moreover, ", "As everyone knows, ", "It is also said that ", "In addition, ", "By the way, "]


def cap(s):
    "`s` with a capital."
    return s[:1].upper() + s[1:]


def low(s, keep):
    "`s` with a small letter, unless it begins with one of `keep`."
    return s if any(s.startswith(k) for k in keep) else s[:1].lower() + s[1:]


ASKED = ["{t}\n\n{q}"] * 6 + [
    "{q}\n\n{t}",
    "Text: {t}\n\nQuestion: {q}",
    "Read the text and answer the question.\n\n{t}\n\n{q}",
    "{t}\n{q}",
]


def ask(r, text, question):
    "The prompt of a text and a question, which mostly stands behind it."
    return r.choice(ASKED).format(t=text, q=question)


def turns(r, text, pairs):
    "One document: the text with the first question, then the others as further turns."
    (q, a), *rest = pairs
    return [(ask(r, text, q), a), *rest]


def facts(r):
    "A passage about one to four invented things, with questions."
    kind = r.choice(list(KINDS))
    make, relations = KINDS[kind]
    told = []
    for _ in range(r.randint(1, 4)):
        n = make(r)
        for value, tell, asked, answers in r.sample(relations, r.randint(3, len(relations))):
            v = value(r)
            told.append((n, v, r.choice(tell), asked, answers))
    if r.random() < 0.5:
        r.shuffle(told)
    text = []
    for n, v, tell, *_ in told:
        s, link = tell.format(n=n, v=v), r.choice(LINK)
        text.append(cap(link + (low(s, (n, v)) if link else s)))
    sep = r.choice([" ", " ", " ", "\n"])

    def pair(t):
        n, v, _, asked, answers = t
        return cap(r.choice(asked).format(n=n, v=v)), cap(r.choice(answers).format(n=n, v=v))

    return turns(r, sep.join(text), [pair(t) for t in r.sample(told, min(len(told), r.randint(1, 5)))])


# ---- keys and values
def token(r):
    "A key or value without meaning: digits, letters, an identifier."
    return r.choice(
        [
            lambda: "".join(r.choice("0123456789abcdef") for _ in range(r.randint(4, 8))),
            lambda: str(r.randint(100, 99999)),
            lambda: name(r).lower(),
            lambda: r.choice("ABCDEFGHKLMNPRSTXZ") + str(r.randint(10, 999)),
            lambda: f"{name(r, (1, 2)).lower()}-{r.randint(1, 99)}",
            lambda: "-".join(
                "".join(r.choice("0123456789abcdef") for _ in range(n))
                for n in r.choice([(4, 4), (4, 4, 4), (8, 4, 4), (8, 4, 4, 4, 12)])
            ),
        ]
    )()


def described(r):
    "A key of two words."
    return r.choice(["blue", "red", "old", "small", "north", "great"]) + " " + name(r, (1, 2)).lower()


KEYS, VALUES = [token, name, person, described], [token, number, name, token]
LAYOUTS = [
    "{k}: {v}",
    "{k} = {v}",
    '"{k}": "{v}",',
    "The code of {k} is {v}.",
    "{k} has the number {v}.",
    "| {k} | {v} |",
    "- {k} -> {v}",
    "The value for {k} is {v}.",
]
VALUE_ASKED = [
    "What is the value for {k}?",
    "Which value belongs to {k}?",
    "{k}?",
    "What stands beside {k}?",
    "What is the code of {k}?",
    'Give the value of the key "{k}".',
    "Tell me the number of {k}.",
]
VALUE_TOLD = ["{v}", "{v}", "The value is {v}.", "{k}: {v}"]


def recall(r, most=40):
    "A list of keys and values in one of many layouts, with questions for some of the values."
    key, value = r.choice(KEYS), r.choice(VALUES)
    pairs = list({key(r): value(r) for _ in range(r.randint(3, most))}.items())
    layout = r.choice(LAYOUTS)
    sep = " " if layout.endswith(".") and r.random() < 0.5 else "\n"
    text = sep.join(layout.format(k=k, v=v) for k, v in pairs)
    if layout.startswith('"'):
        text = "{" + text.rstrip(",") + "}"
    asked, told = r.choice(VALUE_ASKED), r.choice(VALUE_TOLD)
    some = r.sample(pairs, min(len(pairs), r.randint(2, 8)))
    return turns(r, text, [(asked.format(k=k, v=v), told.format(k=k, v=v)) for k, v in some])


# ---- real passages
def sentences(text):
    "The sentences of `text` that are neither very short nor very long."
    return [s.strip() for s in re.split(r"(?<=[.!?])\s+|\n+", text) if 25 < len(s.strip()) < 300]


def rare(sentence, others):
    "Words of the sentence that no other sentence has, long ones first."
    ws = [w for w in re.findall(r"[A-Za-z][A-Za-z'-]{3,}", sentence) if not any(w.lower() in o for o in others)]
    return sorted(dict.fromkeys(ws), key=len, reverse=True)


SAYS = [
    "What does the text say about {w}?",
    "What is said about {w}?",
    "Which sentence mentions {w}?",
    "What does the passage tell us about {w}?",
    "What do we learn about {w}?",
    "Quote what the text says on {w}.",
]
GOES_ON = [
    'How does the sentence go on: "{a}"',
    'Complete from the text: "{a}"',
    "Finish this sentence of the text: {a}",
    'What follows after "{a}"?',
]
GAP = ['Which word is missing: "{a}"', 'Fill the gap from the text: "{a}"', 'What stands in place of the gap: "{a}"']


def about(r, sentence, others):
    "A question about a rare word of `sentence`, which is the answer; None if it has none."
    found = rare(sentence, [o.lower() for o in others])
    if not found:
        return None
    word = r.choice(found[:4])
    after = sentence[sentence.find(word) + len(word) :].split(" ")
    two = len(after) > 2 and after[0] == "" and r.random() < 0.4
    phrase = word + (" " + after[1].strip('.,;:!?()"') if two else "")
    return r.choice(SAYS).format(w=phrase), sentence


def cut_off(r, words):
    "The beginning of a sentence; the answer is how it goes on."
    cut = r.randint(3, len(words) - 3)
    return r.choice(GOES_ON).format(a=" ".join(words[:cut])), " ".join(words[cut:])


def with_gap(r, words):
    "A sentence with a gap; the answer is the word that is missing."
    m = r.randrange(1, len(words) - 1)
    gapped = " ".join([*words[:m], "___", *words[m + 1 :]])
    return r.choice(GAP).format(a=gapped), words[m].strip('.,;:!?()"')


def extract(r, docs, lengths):
    "A run of sentences of a document, drawn by its length, with questions about single ones."
    for _ in range(50):
        ss = sentences(r.choices(docs, cum_weights=lengths)[0])
        if len(ss) >= 3:
            break
    i, n = r.randrange(max(1, len(ss) - 2)), r.randint(3, 14)
    ss = ss[i : i + n]
    pairs = []
    for j in r.sample(range(len(ss)), min(len(ss), r.randint(1, 4))):
        words, how = ss[j].split(" "), r.random()
        if how < 0.55:
            pairs.append(about(r, ss[j], ss[:j] + ss[j + 1 :]))
        elif len(words) > 6:
            pairs.append(cut_off(r, words) if how < 0.8 else with_gap(r, words))
    pairs = [p for p in pairs if p]
    return turns(r, r.choice([" ", " ", "\n"]).join(ss), pairs) if pairs else extract(r, docs, lengths)


def choose(r, pairs):
    "The answers to several questions as one text; one or more of the questions are asked."
    told = []
    for q, a in r.sample(pairs, r.randint(2, 5)):
        ss = sentences(a)
        if ss:
            told.append((q, ss[: r.randint(1, 3)]))
    if len(told) < 2:
        return choose(r, pairs)
    text = [" ".join(ss) for _, ss in told]
    r.shuffle(text)
    sep = r.choice(["\n", "\n\n", " "])
    asked = r.sample(told, r.randint(1, len(told)))
    return turns(r, sep.join(text), [(q, " ".join(ss[:2])) for q, ss in asked])


def tasks(docs, pairs, n=(28000, 18000, 44000, 28000), seed=0):
    """`n` documents each of `facts`, `recall`, `extract` and `choose`, as lists of (question, answer) turns, made from
    texts and question-answer pairs of the training part."""
    r, lengths = random.Random(seed), [*itertools.accumulate(map(len, docs))]
    return dict(
        facts=[facts(r) for _ in range(n[0])],
        recall=[recall(r) for _ in range(n[1])],
        extract=[extract(r, docs, lengths) for _ in range(n[2])],
        choose=[choose(r, pairs) for _ in range(n[3])],
    )
