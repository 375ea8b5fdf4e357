"""Short English paragraphs of made-up facts, and questions about them, for a base model that knows English.

A paragraph holds one to eight facts (subject, kind, value) about invented people, companies, towns, ships, books,
machines, animals, buildings and festivals. Three rules hold everywhere:

* The splits "train" and "test" share no name, no value and no wording: names, numbers and titles belong to a split by
  a hash, every list of words is cut, and the last statement and the last question of each kind are the test's.
* A paragraph holds no two facts of one kind and subject, and no value twice. An answer stands in it word by word.
* Paragraph k is a function of (seed, split, k), on every machine.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from d2l_lib.tasks.world import split_of

SPLITS = ("train", "test")


# -------------------------------------------------------------------------------------------------------------- values
_ONSETS = """
    A Ar Ba Bel Bo Bra Bri Ca Cor Cul Da Del Do Dru E El Fa Fen Fi Flo Ga Gel Gri Ha Hel Ho Hul I Il Ja Jes Jo Ka Kel
    Kri La Lin Lo Lu Ma Mel Mi Mo Na Ned Ni No O Or Pa Pel Pi Qua Ra Rin Ro Sa Sel Si So Sta Ta Tel Ti To Tru U Ul Va
    Vel Vi Wa Wen Wi Ya Yor Za Zel Zu
""".split()
_MIDDLES = """
    ba bi da den do fi ga go la le li lo ma mer mi mo na ni no po ra ri ro sa sel si ta ti to va vi wa zi zo
""".split()
_ENDINGS = """
    bar ck dan den dor fa fin gan kor l lan len lia lin mar mo n na nd nic nor r ra rick s san sk t tan th va x
""".split()
_FIRST_NAMES = """
    Alaric Anselm Araminta Barnaby Beatrix Benedikta Caspian Clementine Cosima Cyprian Dagny Delphine Dorothea Eamon
    Edwina Elspeth Ephraim Eulalia Evander Fenella Ferdinand Florian Giselle Godfrey Gunnar Hadrian Halvard Henrike
    Hortense Ignatius Ingrid Isidore Isolde Jocasta Jolyon Jonquil Kasimir Lavinia Leopold Linnea Lucasta Ludmila Magnus
    Malachi Marguerite Matilda Melchior Mirela Nadezhda Octavia Odette Olympia Osbert Ottilie Peregrine Perpetua Petra
    Philippa Quentin Ragnhild Roderick Rosalind Rufus Seraphina Sigrid Solveig Tancred Thaddeus Theodora Tobias Torvald
    Ulrike Ursula Valentin Verity Wenzel Wilhelmina Winifred Xanthe Yolanda Yorick Zacharias Zelda
""".split()
_SURNAME_ENDINGS = """
    berg bury by croft dal dine ell er field ford gard grove holt king ley man mont quist sen shaw son stad stein
    ton ward well wick wood
""".split()
_TOWN_ENDINGS = "bridge brook bury dale fjord ford haven holm mere mouth pool port stead ton vale ville wick".split()
_TRADES_OF_COMPANIES = """
    Airlines Bakery Books Brewery Electric Foods Foundry Glass Instruments Logistics Motors Optics Press Shipyard
    Software Textiles Toys
""".split()
_SHIPS = "ferry freighter schooner steamer trawler tugboat yacht".split()
_MACHINES = "camera compressor crane engine generator loom microscope printer pump robot telescope tractor".split()
_ANIMALS = "camel cat dog donkey elephant goat horse llama otter parrot tortoise walrus".split()
_BUILDINGS = "Abbey Castle Gallery Hotel Library Lighthouse Museum Observatory Theatre Tower".split()
_FESTIVALS = "Carnival Fair Festival Marathon Regatta".split()
_ADJECTIVES = """
    Amber Broken Burning Crooked Distant Empty Forgotten Frozen Gentle Golden Hidden Hollow Last Long Midnight Paper
    Quiet Restless Salt Second Silent Silver Stolen Summer Tall Velvet Wandering Winter
""".split()
_NOUNS = """
    Archive Bell Bridge Clock Comet Garden Gate Harbour Island Key Ladder Lantern Letter Map Meadow Mirror Orchard
    Promise Railway River Road Shadow Staircase Station Storm Tide Violin Window
""".split()
_MONTHS = "January February March April May June July August September October November December".split()
# Of each list the test has every fourth word, training the others. No word stands twice.
_WORDS = {
    "colour": """
        red blue green black white yellow purple orange grey brown pink turquoise crimson beige scarlet indigo maroon
        navy ivory teal violet magenta lilac olive
    """,
    "material": """
        oak steel brass marble granite copper bamboo glass aluminium sandstone titanium leather pine limestone bronze
        plastic walnut slate concrete rubber iron brick carbon clay
    """,
    "profession": """
        baker lawyer pilot nurse carpenter chemist painter teacher plumber surgeon dentist farmer journalist engineer
        photographer translator tailor architect librarian botanist butcher gardener geologist magician
    """,
    "instrument": """
        piano violin flute trumpet cello harp guitar clarinet accordion drums oboe banjo saxophone trombone mandolin
        harmonica organ bassoon tuba ukulele
    """,
    "food": """
        cheese pancakes apples noodles lentils salmon dumplings cherries rice mushrooms potatoes honey pears carrots
        walnuts plums spinach cabbage tomatoes bread grapes figs onions turnips
    """,
    "goods": """
        bicycles umbrellas clocks candles carpets pianos lamps shoes tents mirrors ladders kettles gloves maps boats
        bells paper soap wine wool salt timber coffee cotton tea sugar glassware furniture
    """,
    "language": """
        Finnish Welsh Turkish Swahili Dutch Korean Latvian Basque Polish Hindi Greek Danish Hungarian Arabic Maltese
        Icelandic Czech Tamil Estonian Catalan
    """,
}


def _in_split(draw: Callable[[], str], split: str) -> str:
    while split_of(value := draw()) != split:
        pass
    return value


def _name(rng: random.Random, split: str, endings: list[str] = _ENDINGS) -> str:
    """A made-up word with a capital, of two or three syllables."""

    def draw() -> str:
        middle = rng.choice(_MIDDLES) if rng.random() < 0.6 or endings is _ENDINGS else ""
        return rng.choice(_ONSETS) + middle + rng.choice(endings)

    return _in_split(draw, split)


def _person(rng: random.Random, split: str) -> str:
    first = _in_split(lambda: rng.choice(_FIRST_NAMES), split) if rng.random() < 0.6 else _name(rng, split)
    return f"{first} {_name(rng, split, _SURNAME_ENDINGS)}"


def _town(rng: random.Random, split: str) -> str:
    before = rng.choice(("", "", "", "", "Port ", "New ", "Upper "))
    return before + _name(rng, split, _TOWN_ENDINGS)


def _company(rng: random.Random, split: str) -> str:
    if rng.random() < 0.3:
        return f"{_name(rng, split, _SURNAME_ENDINGS)} & {_name(rng, split, _SURNAME_ENDINGS)}"
    return f"{_name(rng, split)} {rng.choice(_TRADES_OF_COMPANIES)}"


def _title(rng: random.Random, split: str) -> str:
    adjective, noun, other = rng.choice(_ADJECTIVES), rng.choice(_NOUNS), rng.choice(_NOUNS)
    if rng.random() < 0.3:
        return f"The {noun} of {_name(rng, split, _TOWN_ENDINGS)}"
    titles = f"The {adjective} {noun}", f"{adjective} {noun}", f"The {adjective} {noun} and the {other}"
    title = rng.choice(titles)
    return title if split_of(f"{adjective} {noun}") == split and noun != other else _title(rng, split)


def _date(rng: random.Random, split: str) -> str:
    day, month, year = rng.randint(1, 28), rng.choice(_MONTHS), rng.randint(1700, 2023)
    date = rng.choice((f"{day} {month} {year}", f"{month} {day}, {year}"))
    return date if split_of(f"{day} {month}") == split_of(f"{year}") == split else _date(rng, split)


def _day(rng: random.Random, split: str) -> str:
    day, month = rng.randint(1, 28), rng.choice(_MONTHS)
    return rng.choice((f"{day} {month}", f"{month} {day}")) if split_of(f"{day} {month}") == split else _day(rng, split)


def _price(rng: random.Random, split: str) -> str:
    amount = _number(3, 9999)(rng, split)
    return rng.choice((f"${amount}", f"£{amount}", f"{amount} euros", f"{amount} dollars"))


def _fortune(rng: random.Random, split: str) -> str:
    amount = _in_split(lambda: f"{rng.randint(2, 99)}.{rng.randint(1, 9)}", split)
    return f"{amount} million {rng.choice(('dollars', 'euros', 'pounds'))}"


def _time(rng: random.Random, split: str) -> str:
    hour, minute = _in_split(lambda: f"{rng.randint(1, 12)}:{rng.randrange(0, 60, 5):02d}", split).split(":")
    return f"{hour}:{minute} {rng.choice(('am', 'pm'))}"


def _code(rng: random.Random, split: str) -> str:
    letters = "ABCDEFGHJKLMNPRSTUVWXZ"
    return _in_split(lambda: f"{rng.choice(letters)}{rng.choice(letters)}-{rng.randint(100, 999)}", split)


def _number(low: int, high: int, unit: str = "") -> Callable[[random.Random, str], str]:
    return lambda rng, split: _in_split(lambda: f"{rng.randint(low, high):,}", split) + (f" {unit}" if unit else "")


def _word(of: str) -> Callable[[random.Random, str], str]:
    words = _WORDS[of].split()
    parts = {"test": words[3::4], "train": [word for number, word in enumerate(words) if number % 4 != 3]}
    return lambda rng, split: rng.choice(parts[split])


_VALUES: dict[str, Callable[[random.Random, str], str]] = {
    "person": _person,
    "town": _town,
    "company": _company,
    "title": _title,
    "date": _date,
    "day": _day,
    "year": lambda rng, split: _in_split(lambda: str(rng.randint(1600, 2023)), split),
    "time": _time,
    "price": _price,
    "fortune": _fortune,
    "code": _code,
    "count": _number(100, 90_000),
    "hundreds": _number(60, 990),
    "metres": _number(12, 400, "metres"),
    "height": _number(30, 3000, "metres"),
    "kilograms": _number(3, 900, "kilograms"),
    "knots": _number(8, 90, "knots"),
    "watts": _number(40, 9000, "watts"),
    "kilometres": _number(5, 900, "kilometres"),
    "years": _number(2, 99, "years"),
    **{name: _word(name) for name in _WORDS},
}
_SUBJECTS: dict[str, Callable[[random.Random, str], str]] = {
    "person": _person,
    "company": _company,
    "town": _town,
    "ship": lambda rng, split: f"the {rng.choice(_SHIPS)} {_name(rng, split)}",
    "book": lambda rng, split: f'"{_title(rng, split)}"',
    "machine": lambda rng, split: f"the {_name(rng, split)} {rng.choice(_MACHINES)}",
    "animal": lambda rng, split: f"the {rng.choice(_ANIMALS)} {_name(rng, split)}",
    "building": lambda rng, split: f"the {_name(rng, split)} {rng.choice(_BUILDINGS)}",
    "festival": lambda rng, split: f"the {_name(rng, split, _TOWN_ENDINGS)} {rng.choice(_FESTIVALS)}",
}

# --------------------------------------------------------------------------------------------------------------- kinds
# Subject and name of a kind, type of its value; two lines of statements; two of questions. {s}: the subject, {v}: the
# value, {a}: the article of a value. The last statement and the last question are the test's.
_KINDS_TEXT = """
person birthplace: town
    {s} was born in {v} / The birthplace of {s} is {v}
    {s} comes from {v} / It was in {v} that {s} came into the world
    Where was {s} born / Which town does {s} come from
    What is the birthplace of {s} / In which place did {s} come into the world
person birthday: date
    {s} was born on {v} / The date of birth of {s} is {v}
    {s} came into the world on {v} / The birth of {s} took place on {v}
    When was {s} born / What is the date of birth of {s}
    On which date was {s} born / On what day did {s} come into the world
person profession: profession
    {s} works as {a} {v} / {s} is {a} {v} by profession
    The profession of {s} is that of {a} {v} / {s} earns a living as {a} {v}
    What does {s} work as / What is the profession of {s}
    What is the job of {s} / How does {s} earn a living
person employer: company
    {s} works for {v} / {s} is employed by {v}
    {s} has a job at {v} / The employer of {s} is {v}
    Which company does {s} work for / Who employs {s}
    At which company does {s} have a job / What is the name of the employer of {s}
person instrument: instrument
    {s} plays the {v} / {s} has played the {v} since childhood
    The favourite instrument of {s} is the {v} / In the evenings {s} practises the {v}
    Which instrument does {s} play / What does {s} play
    What is the favourite instrument of {s} / What does {s} practise in the evenings
person teacher: person
    {s} was taught by {v} / {s} was a student of {v}
    The teacher of {s} was {v} / {v} trained {s}
    Who taught {s} / Who was the teacher of {s}
    Whose student was {s} / By whom was {s} trained
person spouse: person
    {s} is married to {v} / {s} married {v}
    The spouse of {s} is {v} / {s} and {v} are a married couple
    Who is {s} married to / Whom did {s} marry
    Who is the spouse of {s} / What is the name of the person whom {s} married
person language: language
    {s} speaks {v} / {s} grew up speaking {v}
    The mother tongue of {s} is {v} / {s} is fluent in {v}
    Which language does {s} speak / What is the mother tongue of {s}
    What language did {s} grow up with / In which language is {s} fluent
person title: title
    {s} wrote the book "{v}" / {s} is the author of "{v}"
    "{v}" was written by {s} / The only novel by {s} is called "{v}"
    Which book did {s} write / What is {s} the author of
    What is the title of the book by {s} / What is the novel by {s} called
company founder: person
    {s} was founded by {v} / {v} founded {s}
    The founder of {s} was {v} / It was {v} who set up {s}
    Who founded {s} / Who was the founder of {s}
    By whom was {s} founded / Who set up {s}
company founding: year
    {s} was founded in {v} / {s} has existed since {v}
    The founding year of {s} is {v} / {s} opened for business in {v}
    When was {s} founded / Since when has {s} existed
    What is the founding year of {s} / In what year did {s} open for business
company seat: town
    {s} is based in {v} / The headquarters of {s} are in {v}
    {s} has its main office in {v} / {v} is home to {s}
    Where is {s} based / Where are the headquarters of {s}
    In which town does {s} have its main office / Which town is home to {s}
company staff: count
    {s} employs {v} people / {v} people work at {s}
    {s} has {v} employees / The staff of {s} numbers {v}
    How many people does {s} employ / How many people work at {s}
    How many employees does {s} have / What is the size of the staff of {s}
company product: goods
    {s} makes {v} / {s} produces {v}
    {s} is a maker of {v} / The factory of {s} turns out {v}
    What does {s} make / What does {s} produce
    What is {s} a maker of / What does the factory of {s} turn out
company director: person
    {s} is run by {v} / The director of {s} is {v}
    {v} is in charge of {s} / At the head of {s} stands {v}
    Who runs {s} / Who is the director of {s}
    Who is in charge of {s} / Who stands at the head of {s}
company profit: fortune
    {s} made a profit of {v} last year / The profit of {s} was {v}
    {s} earned {v} last year / Last year brought {s} a profit of {v}
    How much profit did {s} make / What was the profit of {s}
    How much did {s} earn last year / How large a profit did last year bring {s}
town mayor: person
    The mayor of {s} is {v} / {v} is the mayor of {s}
    {s} elected {v} as its mayor / {v} leads the town council of {s}
    Who is the mayor of {s} / What is the name of the mayor of {s}
    Whom did {s} elect as its mayor / Who leads the town council of {s}
town population: count
    {s} has {v} inhabitants / {v} people live in {s}
    The population of {s} is {v} / {s} is home to {v} people
    How many inhabitants does {s} have / How many people live in {s}
    What is the population of {s} / To how many people is {s} home
town altitude: height
    {s} lies {v} above the sea / The altitude of {s} is {v}
    {s} is at a height of {v} / {s} was built {v} above sea level
    How far above the sea does {s} lie / What is the altitude of {s}
    At what height is {s} / How high above sea level was {s} built
town export: goods
    {s} is known for its {v} / {s} is famous for {v}
    The main export of {s} is {v} / Merchants in {s} deal in {v}
    What is {s} known for / What is {s} famous for
    What is the main export of {s} / What do merchants in {s} deal in
town twin: town
    {s} is twinned with {v} / The twin town of {s} is {v}
    {s} has a partnership with {v} / Pupils from {s} go on exchange to {v}
    Which town is {s} twinned with / What is the twin town of {s}
    With which town does {s} have a partnership / To which town do pupils from {s} go on exchange
ship captain: person
    {s} is commanded by {v} / The captain of {s} is {v}
    {v} is the captain of {s} / On the bridge of {s} stands {v}
    Who commands {s} / Who is the captain of {s}
    What is the name of the captain of {s} / Who stands on the bridge of {s}
ship length: metres
    {s} is {v} long / The length of {s} is {v}
    {s} has a length of {v} / From bow to stern {s} measures {v}
    How long is {s} / What is the length of {s}
    What length does {s} have / What does {s} measure from bow to stern
ship port: town
    The home port of {s} is {v} / {s} sails from {v}
    {s} is registered in {v} / {s} belongs to the harbour of {v}
    What is the home port of {s} / Where does {s} sail from
    Where is {s} registered / To which harbour does {s} belong
ship launch: year
    {s} was launched in {v} / {s} has been at sea since {v}
    The launch of {s} was in {v} / {s} first touched water in {v}
    When was {s} launched / Since when has {s} been at sea
    In which year was the launch of {s} / When did {s} first touch water
ship cargo: goods
    {s} carries {v} / The cargo of {s} is {v}
    {s} is loaded with {v} / Below its deck {s} holds {v}
    What does {s} carry / What is the cargo of {s}
    What is {s} loaded with / What does {s} hold below its deck
ship speed: knots
    {s} can reach {v} / The top speed of {s} is {v}
    {s} sails at up to {v} / At full power {s} makes {v}
    What speed can {s} reach / What is the top speed of {s}
    How fast does {s} sail / How fast is {s} at full power
book author: person
    {s} was written by {v} / {v} wrote {s}
    The author of {s} is {v} / {s} is a novel by {v}
    Who wrote {s} / Who is the author of {s}
    By whom was {s} written / Whose novel is {s}
book pages: hundreds
    {s} has {v} pages / {s} runs to {v} pages
    There are {v} pages in {s} / A reader of {s} turns {v} pages
    How many pages does {s} have / How many pages are there in {s}
    To how many pages does {s} run / How many pages does a reader of {s} turn
book year: year
    {s} was published in {v} / {s} came out in {v}
    {s} first appeared in {v} / The first edition of {s} is from {v}
    When was {s} published / In which year did {s} come out
    When did {s} first appear / What year is the first edition of {s} from
book publisher: company
    {s} was published by {v} / The publisher of {s} is {v}
    {v} published {s} / {v} brought out {s}
    Who published {s} / Which company is the publisher of {s}
    By which company was {s} published / Who brought out {s}
book cover: colour
    {s} has a cover in {v} / The cover of {s} is {v}
    The colour of the cover of {s} is {v} / {s} is bound in {v}
    Which colour does the cover of {s} have / What colour is the cover of {s}
    In what colour is the cover of {s} / In which colour is {s} bound
book setting: town
    {s} is set in {v} / The story of {s} takes place in {v}
    The setting of {s} is {v} / The heroes of {s} live in {v}
    Where is {s} set / Where does the story of {s} take place
    What is the setting of {s} / Where do the heroes of {s} live
machine inventor: person
    {s} was invented by {v} / {v} invented {s}
    The inventor of {s} is {v} / It was {v} who thought up {s}
    Who invented {s} / Who is the inventor of {s}
    By whom was {s} invented / Who thought up {s}
machine weight: kilograms
    {s} weighs {v} / The weight of {s} is {v}
    {s} has a weight of {v} / On the scales {s} shows {v}
    How much does {s} weigh / What is the weight of {s}
    How heavy is {s} / What does {s} show on the scales
machine price: price
    {s} costs {v} / The price of {s} is {v}
    {s} is sold for {v} / Buyers pay {v} for {s}
    How much does {s} cost / What is the price of {s}
    For how much is {s} sold / What do buyers pay for {s}
machine material: material
    {s} is made of {v} / The frame of {s} is made of {v}
    {s} consists mostly of {v} / {s} has a body of {v}
    What is {s} made of / What material is {s} made of
    What does {s} mostly consist of / Of which material is the body of {s}
machine power: watts
    {s} needs {v} / The power of {s} is {v}
    {s} uses {v} of power / The motor of {s} draws {v}
    How much power does {s} need / What is the power of {s}
    How much power does {s} use / What does the motor of {s} draw
machine serial: code
    The serial number of {s} is {v} / {s} has the serial number {v}
    {s} is listed under the number {v} / The plate on {s} reads {v}
    What is the serial number of {s} / Which serial number does {s} have
    Under which number is {s} listed / What does the plate on {s} read
animal owner: person
    {s} belongs to {v} / The owner of {s} is {v}
    {v} owns {s} / {s} lives with {v}
    Who does {s} belong to / Who is the owner of {s}
    Who owns {s} / With whom does {s} live
animal food: food
    {s} eats {v} / {s} likes to eat {v}
    The favourite food of {s} is {v} / {s} is fed with {v}
    What does {s} eat / What does {s} like to eat
    What is the favourite food of {s} / What is {s} fed with
animal age: years
    {s} is {v} old / The age of {s} is {v}
    {s} has reached an age of {v} / {s} has lived for {v}
    How old is {s} / What is the age of {s}
    What age has {s} reached / For how long has {s} lived
animal colour: colour
    {s} wears a collar in {v} / The collar of {s} is {v}
    The colour of the collar of {s} is {v} / Around the neck of {s} is a ribbon in {v}
    Which colour does the collar of {s} have / What colour is the collar of {s}
    In what colour is the collar of {s} / What colour is the ribbon around the neck of {s}
building architect: person
    {s} was designed by {v} / The architect of {s} was {v}
    {v} designed {s} / The plans for {s} were drawn by {v}
    Who designed {s} / Who was the architect of {s}
    By whom was {s} designed / Who drew the plans for {s}
building height: metres
    {s} is {v} tall / The height of {s} is {v}
    {s} rises to {v} / From the ground to the roof {s} measures {v}
    How tall is {s} / What is the height of {s}
    To what height does {s} rise / What does {s} measure from the ground to the roof
building opening: date
    {s} was opened on {v} / {s} opened on {v}
    The opening of {s} was on {v} / {s} received its first visitors on {v}
    When was {s} opened / On which date did {s} open
    When was the opening of {s} / When did {s} receive its first visitors
building stone: material
    {s} is built of {v} / The walls of {s} are made of {v}
    {s} has walls of {v} / The builders of {s} used {v}
    What is {s} built of / What are the walls of {s} made of
    Which material are the walls of {s} / What did the builders of {s} use
building ticket: price
    A ticket for {s} costs {v} / The entrance fee of {s} is {v}
    A visit to {s} costs {v} / Guests pay {v} to enter {s}
    How much is a ticket for {s} / What is the entrance fee of {s}
    What does a visit to {s} cost / What do guests pay to enter {s}
building hours: time
    {s} opens its doors at {v} / The doors of {s} open at {v}
    Every morning the day at {s} starts at {v} / Staff unlock {s} at {v}
    At what time does {s} open its doors / When do the doors of {s} open
    When does the day at {s} start / At what time do staff unlock {s}
festival place: town
    {s} takes place in {v} / {s} is held in {v}
    The host of {s} is {v} / {v} is the scene of {s}
    Where does {s} take place / Where is {s} held
    Which town is the host of {s} / Which town is the scene of {s}
festival day: day
    {s} begins on {v} / The first day of {s} is {v}
    {s} starts every year on {v} / The opening parade of {s} is on {v}
    When does {s} begin / What is the first day of {s}
    On which day of the year does {s} start / When is the opening parade of {s}
festival visitors: count
    {s} attracts {v} visitors / {v} people visit {s}
    {s} is visited by {v} guests / The crowd at {s} numbers {v}
    How many visitors does {s} attract / How many people visit {s}
    By how many guests is {s} visited / What is the size of the crowd at {s}
festival prize: price
    The winner of {s} receives {v} / The first prize of {s} is {v}
    {s} has a first prize of {v} / Whoever wins {s} takes home {v}
    How much does the winner of {s} receive / What is the first prize of {s}
    What first prize does {s} have / What does whoever wins {s} take home
festival route: kilometres
    The route of {s} is {v} long / The course of {s} has a length of {v}
    {s} covers {v} / Those who take part in {s} travel {v}
    How long is the route of {s} / What is the length of the course of {s}
    What distance does {s} cover / How far do those who take part in {s} travel
"""
_OPENINGS = {
    "train": ("According to the records, ", "It is known that ", "As everybody agrees, ", "The guide says that "),
    "test": ("Local papers report that ", "By all accounts, "),
}
_JOINTS = {"train": (", and ", ", while "), "test": ("; ", ", whereas ")}


@dataclass(frozen=True)
class _Kind:
    """One kind of fact: type of its subject, name, type of its value, and its wordings."""

    subject: str
    name: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


def _read_kinds(text: str) -> tuple[_Kind, ...]:
    lines, kinds = text.strip().splitlines(), []
    for head, *wordings in zip(*(lines[start::5] for start in range(5)), strict=True):
        subject, name, value = re.fullmatch(r"(\w+) (\w+): (\w+)", head).groups()
        first, second, third, fourth = (tuple(part.strip() for part in line.split(" / ")) for line in wordings)
        statements = tuple(f"{statement}." for statement in first + second)
        kinds.append(_Kind(subject, name, value, statements, tuple(f"{question}?" for question in third + fourth)))
    return tuple(kinds)


KINDS = _read_kinds(_KINDS_TEXT)
_KINDS_OF = {subject: [kind for kind in KINDS if kind.subject == subject] for subject in _SUBJECTS}


def wordings_of(wordings: tuple[str, ...], split: str) -> tuple[str, ...]:
    """Those of a kind's statements or questions that this split uses."""
    return wordings[-1:] if split == "test" else wordings[:-1]


_APART = ("spouse", "twin", "author")  # kinds whose values are no subjects: the fact would answer questions on them
_SHARED = {*_TRADES_OF_COMPANIES, *_BUILDINGS, *_FESTIVALS, *_MONTHS, "Port", "Upper"}  # by many names


# ---------------------------------------------------------------------------------------------------------- paragraphs
@dataclass(frozen=True)
class Fact:
    """What a paragraph says of a subject."""

    subject: str
    kind: _Kind
    value: str


@dataclass(frozen=True)
class Paragraph:
    """A text and its facts, in the order of the text."""

    text: str
    facts: tuple[Fact, ...]


def draw_paragraph(rng: random.Random, split: str, n_facts: int) -> Paragraph:
    """A fresh paragraph of `n_facts` facts with names, values and wordings of `split`; ValueError for other splits."""
    if split not in SPLITS:
        raise ValueError(f"the facts have no split {split!r}; choose one of {', '.join(SPLITS)}")
    facts = _draw_facts(rng, split, n_facts)
    rng.shuffle(facts)
    if rng.random() < 0.5:  # subject by subject
        order = [fact.subject for fact in facts]
        facts.sort(key=lambda fact: order.index(fact.subject))
    return Paragraph(_write(rng, facts, split), tuple(facts))


def _draw_facts(rng: random.Random, split: str, n_facts: int) -> list[Fact]:
    """Facts about some subjects, often of one or two types, so that facts of one kind differ by their names alone."""
    types = rng.sample(list(_SUBJECTS), rng.choice((1, 1, 2, 2, 3, 5)))
    subjects: dict[str, str] = {}
    for _ in range(rng.randint((n_facts + 2) // 3, n_facts)):
        kind = rng.choice(types)
        subjects.setdefault(_fresh(rng, _SUBJECTS[kind], split, list(subjects)), kind)
    facts, stated, values = [], set(), list(subjects)
    waiting = list(subjects)  # each has a fact before others have two
    while len(facts) < n_facts:
        subject = waiting.pop() if waiting else rng.choice(list(subjects))
        free = [kind for kind in _KINDS_OF[subjects[subject]] if (subject, kind) not in stated]
        if not free:  # all is said about it
            kind = rng.choice(types)
            subjects[_fresh(rng, _SUBJECTS[kind], split, values)] = kind
            continue
        common = [kind for kind in free if any(fact.kind is kind for fact in facts)]
        kind = rng.choice(common if common and rng.random() < 0.5 else free)
        known = [name for name, of in subjects.items() if of == kind.value and name != subject]
        known = [name for name in known if all(fact.value != name for fact in facts)]
        again = known and kind.name not in _APART and rng.random() < 0.5
        value = rng.choice(known) if again else _fresh(rng, _VALUES[kind.value], split, values)
        if value is None:  # all words of a short list stand in the paragraph
            waiting.append(subject)
            continue
        stated.add((subject, kind))
        values.append(value)
        facts.append(Fact(subject, kind, value))
    return facts


def _fresh(rng: random.Random, draw: Callable[[random.Random, str], str], split: str, known: list[str]) -> str | None:
    """A name or value that shares no long word with a capital, and no whole text, with those known; None: too few."""
    taken = {word for text in known for word in re.findall(r"[A-Z]\w{3,}", text)} - _SHARED
    for _ in range(1000):
        text = draw(rng, split)
        if text not in known and not taken & set(re.findall(r"\w+", text)):
            return text
    return None


def _fill(template: str, fact: Fact) -> str:
    article = "an" if fact.value[0] in "aeiou" else "a"
    return template.format(s=fact.subject, v=fact.value, a=article)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _write(rng: random.Random, facts: list[Fact], split: str) -> str:
    """Sentences of one fact, some with an opening, some of two facts."""
    text = ""
    for fact in facts:
        statement, form = rng.choice(wordings_of(fact.kind.statements, split)), rng.random()
        within = statement if statement[0] in '{"' else statement[0].lower() + statement[1:]
        if text and form < 0.12:
            text = text[:-1] + rng.choice(_JOINTS[split]) + _fill(within, fact)
        elif form < 0.22:
            text += " " + rng.choice(_OPENINGS[split]) + _fill(within, fact)
        else:
            text += " " + _capital(_fill(statement, fact))
    return text.strip()


# ----------------------------------------------------------------------------------------------------------- questions
def fact_samples(n: int, seed: int, n_facts: tuple[int, int] = (1, 8), split: str = "train") -> pd.DataFrame:
    """`n` questions about fresh paragraphs, three to five about each, one per row, in the order of the paragraphs.

    Columns: dataset ("facts"), id ("split/seed/paragraph/question"), document, question, answers (list of one text),
    kind (of fact, "person birthplace"), title (empty), n_facts. More questions begin with the same ones.

    n_facts: fewest and most facts of a paragraph. Paragraphs with few facts have fewer questions where the split has no
        other wording for them.
    split: "train" or "test", ValueError for others.
    """
    low, high = n_facts
    if not 1 <= low <= high:
        raise ValueError(f"n_facts is {n_facts}: give the fewest and the most facts of a paragraph, from one up")
    rows: list[dict] = []
    number = 0
    while len(rows) < n:
        rng = random.Random(f"facts/{split}/{seed}/{number}")
        paragraph = draw_paragraph(rng, split, rng.randint(low, high))
        for place, (fact, question) in enumerate(_questions(rng, paragraph, split)):
            rows.append(
                {"dataset": "facts", "id": f"{split}/{seed}/{number}/{place}", "document": paragraph.text}
                | {"question": question, "answers": [fact.value], "kind": f"{fact.kind.subject} {fact.kind.name}"}
                | {"title": "", "n_facts": len(paragraph.facts)}
            )
        number += 1
    return pd.DataFrame(rows[:n])


def _questions(rng: random.Random, paragraph: Paragraph, split: str) -> list[tuple[Fact, str]]:
    """Three to five (fact, question) pairs, each fact once before any twice."""
    pairs = []
    for fact in paragraph.facts:
        templates = rng.sample(wordings_of(fact.kind.questions, split), len(wordings_of(fact.kind.questions, split)))
        pairs += [(turn, rng.random(), fact, template) for turn, template in enumerate(templates)]
    pairs.sort(key=lambda pair: pair[:2])
    return [(fact, _capital(_fill(template, fact))) for _, _, fact, template in pairs[: rng.randint(3, 5)]]
