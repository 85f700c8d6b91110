"""Single sentences with and without insults, and ordinary words: data for the classifier.

Slots of the frames: `{one}` (with `{is}`) and `{other}` are people, `{deed}` what one of them did,
`{trait}` and `{role}` harmless descriptions, `{bother}` something to dislike, `{item}` a thing;
`{noun}`, `{adjective}`, `{another_adjective}` and `{insult}` are insulting.
"""

PRONOUNS = ("you", "he", "she", "they")
NAMES = (
    "my boss",
    "my brother",
    "the waiter",
    "that driver",
    "the neighbor",
    "#Person1#",
    "#Person2#",
    "the teacher",
    "Anna",
    "Tommy",
    "Mr. Smith",
    "the manager",
    "my roommate",
)

SLOTS: dict[str, tuple[str, ...]] = {
    "deed": (
        "forgot the keys",
        "came late",
        "ate my lunch",
        "sold the old car",
        "cancelled the trip",
        "wrote a long letter",
        "broke the window",
        "missed the train",
        "asked for a refund",
        "painted the door",
        "called three times",
        "lost the tickets",
        "left early",
        "cooked dinner",
        "opened the shop",
        "cleaned the kitchen",
        "read the book",
        "fixed the bike",
        "did not pay the rent",
        "told everyone about the gift",
    ),
    "trait": (
        "friendly",
        "tired",
        "busy",
        "tall",
        "quiet",
        "careful",
        "new",
        "clever",
        "honest",
        "late",
        "angry",
        "upset",
        "sad",
        "nervous",
        "polite",
        "strict",
        "disappointed",
        "worried",
        "great",
        "kind",
    ),
    "role": (
        "student",
        "doctor",
        "driver",
        "friend",
        "manager",
        "neighbor",
        "teacher",
        "customer",
        "colleague",
        "cook",
        "guest",
        "nurse",
        "person",
    ),
    "bother": (
        "waiting in the rain",
        "getting up early",
        "cold soup",
        "this traffic",
        "the noise",
        "long meetings",
        "Mondays",
        "doing the dishes",
        "the smell of paint",
        "being late",
    ),
    "thing": (
        "weather",
        "movie",
        "food",
        "soup",
        "traffic",
        "news",
        "hotel",
        "accident",
        "headache",
        "storm",
    ),
    "bad": ("terrible", "bad", "dreadful", "horrible", "sad", "poor"),
}

HATEFUL = (
    "{one} {is} {insult}.",
    "{one} {is} so {adjective}.",
    "{one} {is} {adjective} and {another_adjective}.",
    "What {insult}!",
    "{one} {deed} like {insult}.",
    "Shut up, {noun}.",
    "Shut up, you {adjective} {noun}!",
    "{one} told {other} to shut up.",
    "That {adjective} {noun} {deed}.",
    "{one} called {other} {insult}.",
    "{one}, {insult}, {deed}.",
    "The {noun} {deed}.",
    "{one} {is} sick of the {adjective} {noun}.",
    "{one} {deed}, what {insult}.",
    "I can't stand {other}, {insult} who {deed}.",
    "You {adjective} {noun}! You {deed}.",
    "I am {insult}.",
    "How can I be so {adjective}?",
    "{one} told {other} that the movie was {bad}, {adjective} and {another_adjective}.",
    "Only {insult} would do that.",
    "I hate you, you {noun}.",
    "I hate {other}. What {insult}!",
    "{one} {is} calling {other} {insult} because of the {item}.",
    "I hate you so much.",
    "You are a {bad} person.",
)

HARMLESS = (
    "{one} {is} {trait}.",
    "{one} {is} so {trait}.",
    "{one} {is} the {trait} {role}.",
    "What a {role}!",
    "{one} {deed}.",
    "{one} {deed} like a {role}.",
    "That {trait} {role} {deed}.",
    "The {role} {deed}.",
    "{one}, the {role}, {deed}.",
    "{one} told {other} to sit down.",
    "{one} called {other} on the phone.",
    "{one} talked to {other} who {deed}.",
    "I can't find {other}, the {role} who {deed}.",
    "You {deed}.",
    "I am {trait}.",
    "I {deed}.",
    "{one} will call {other} tomorrow.",
    # Angry, sad or negative, and not an insult to anybody.
    "{one} had a {bad} headache.",
    "The {thing} was {bad} and cold.",
    "The {thing} is {bad} today.",
    "What {bad} weather!",
    "I hate {bother}.",
    "{one} told me about {bother}. I hate it.",
    "I really can't stand {bother}.",
    "{one} killed the engine and got out.",
    "{one} made a joke and we laughed.",
    "It was a {bad} accident.",
    "It was a {bad} day for me.",
    "{one} {is} angry about the broken {item}.",
    "{one} argued with {other} about the {item}.",
    "{one} {is} angry with {other} who {deed}.",
    "{one} {is} upset with {other} who {deed}.",
    "{one} complained that {other} {deed}.",
    "{one} shouted because the {item} was gone.",
    "Stop shouting at me.",
    "Leave me alone, please.",
    "Don't talk to me like that.",
    "That is none of your business!",
    "{one} apologized for the insult.",
    "That was a big mistake.",
    "{one} {is} wrong about the {item}.",
    "{one} and {other} argued because of the {item}.",
    "{one} told {other} that the movie was {bad}.",
    "{one} told {other} about not liking the movie.",
    "{one} told {other} that he didn't like the movie.",
    "I don't like this {item}.",
)

HELD_OUT_HATEFUL = (
    "Everybody knows that {one} {is} {insult}.",
    "Why did I ever trust such {insult}?",
    "Look at this {noun}, so {adjective} as always.",
    "{other} thinks that {one} {is} {adjective}.",
    "Get out of here, {noun}!",
    "It was {adjective} of you, {noun}.",
)

HELD_OUT_HARMLESS = (
    "Everybody knows that {one} {is} the {role}.",
    "Why did I ever trust the {role} with my {item}?",
    "Look at this {item}, so {bad} as always.",
    "{other} thinks that {one} {is} {trait}.",
    "Get out of the rain, please!",
    "It was a mistake to buy the {item}.",
)

# "You are a great person and i like you." and its opposite, in many words.

FEELINGS = (
    "You are {quality} {being} and I {feel} you.",
    "You are {quality} {being}, and I {feel} you.",
    "You are such {quality} {being}. I {feel} you.",
    "You are {quality} {being} and I really {feel} you!",
    "{one} {is} {quality} {being} and I {feel} {object}.",
    "I {feel} {object} because {one} {is} {quality} {being}.",
    "I {feel} you. You are {quality} {being}.",
    "You are {adjective} and I {feel} you.",
    "I think you are {quality} {being} and we all {feel} you.",
    "{one} told {other} that I {feel} {object}.",
    "I {feel} you.",
    "You are {quality} {being}.",
)

_BEINGS = ("person", "person", "man", "woman", "friend", "boss", "neighbor", "human being")
_OBJECTS = ("him", "her", "them", "you", "#Person1#", "#Person2#", "my boss", "Anna")

KIND: dict[str, tuple[str, ...]] = {
    "adjective": (
        "great",
        "kind",
        "wonderful",
        "lovely",
        "nice",
        "good",
        "brilliant",
        "helpful",
        "fantastic",
        "amazing",
    ),
    "feel": ("like", "love", "admire", "trust", "respect", "miss", "adore"),
    "being": _BEINGS,
    "object": _OBJECTS,
}

UNKIND: dict[str, tuple[str, ...]] = {
    "adjective": (
        "terrible",
        "horrible",
        "awful",
        "bad",
        "nasty",
        "disgusting",
        "mean",
        "evil",
        "stupid",
        "rotten",
    ),
    "feel": ("hate", "despise", "can't stand", "detest", "loathe", "hate"),
    "being": _BEINGS,
    "object": _OBJECTS,
}

ORDINARY_WORDS = """
a about above across act add afraid after again against age ago agree air all almost alone along
already also always am among amount an and angry animal another answer any anyone anything apartment
appear apple apply area arm around arrive art article as ask at attention aunt away baby back bad bag
ball bank base bath be bear beat beautiful because become bed before begin behind believe best better
between big bill bird birth black blood blue board boat body book born both bottle bottom box boy bread
break breakfast bring brother brown build building burn business busy but buy by call camera can car
card care carry case cat catch cause center century certain chair chance change cheap check chicken
child children choice choose church city class clean clear clock close clothes club coat coffee cold
college color come comfortable common company computer condition consider continue control cook cool
copy corner correct cost could country couple course cover credit cross cry cup customer cut dad daily
dance danger dark date daughter day dead deal dear death decide deep degree department describe design
desk dictionary die difference different difficult dinner direct discount discuss dish do doctor does
dog dollar door double down draw dream dress drink drive drop dry during each ear early earth east easy
eat education effect egg eight either electric else email empty end energy engine English enjoy enough
enter environment even evening ever every everybody everyone everything exactly exam example excellent
except exchange excuse exercise expect expensive experience explain extra eye face fact fail fall
family famous far farm fast father favorite fear feel feeling feet few field fight figure fill film
final find fine finger finish fire first fish fit five fix flat flight floor flower fly follow food
foot football for foreign forget form forward four free fresh friend from front fruit full fun further
future game garden gas general get gift girl give glad glass go goal gold good government great green
ground group grow guess guest guide habit had hair half hall hand happen happy hard has hat hate have
he head health hear heart heat heavy hello help her here high him himself his history hit hold holiday
home hope horse hospital hot hotel hour house how however huge human hundred hungry hurry hurt husband
ice idea if important improve in include increase information inside insurance interest international
internet interview into introduce invite is it its job join just keep key kid kind kitchen knock know
knowledge lady lamp land language large last late laugh law lead learn least leave left leg lend less
lesson let letter level library lie life light like line list listen little live local lonely long look
lose lot loud love low luck lunch machine made magazine mail main make man manager many map market
marry matter may maybe me meal mean measure meat medicine meet meeting member message middle might mile
milk mind minute miss moment money month more morning most mother mountain mouth move movie much music
must name nation nature near necessary need neighbor nervous never new news newspaper next nice night
nine no noise none normal north nose not note nothing notice now number of off offer office often oil
old on once one only open opinion or order other our out outside over own page pain paint paper parent
park part party pass past pay peace pen people perfect perhaps person phone photo piano picture piece
place plan plane plant play please pleasure point police polite poor popular position possible post
power practice prepare present president pretty price private problem produce product program project
promise public pull purpose push put quality quarter question quick quiet quite race radio rain reach
read ready real realize really reason receive recent recommend red relax remember rent repair repeat
reply report rest restaurant result return rich ride right ring river road room round rule run sad safe
said salary sale same sandwich save say school science sea seat second secret secretary see seem sell
send sense sentence serious serve service set seven several shall shape share she shirt shoe shop short
should show shower sick side sign simple since sing single sister sit situation six size skin sleep
slow small smart smell smile smoke snow so social some someone something sometimes son song soon sorry
sound soup south space speak special speed spend sport spring square staff stand star start state
station stay step still stone stop store storm story straight strange street stress strong student
study style subject such sudden sugar suggest suit summer sun supper support suppose sure surprise
sweet swim table take talk tall taste tax taxi tea teach team tell ten tennis test than thank that the
their them then there these they thing think third this those though thought thousand three through
throw ticket tie time tired to today together tomorrow tonight too tooth top total touch tour towards
town traffic train travel tree trip trouble true trust try turn two type uncle under understand
university until up us use usual vacation value very view village visit voice wait walk wall want war
warm was wash watch water way we weak wear weather wedding week weekend weight welcome well were west
wet what when where which while white who whole why wide wife will wind window wine winter wish with
without woman wonder wonderful word work world worry would write wrong yard year yellow yes yesterday
yet you young your
action actually addition apologize application appointment attitude available celebrate communication
complain computer concert conversation decision definitely especially everywhere graduate graduation
immediately interested interesting invitation management probably professional quickly relationship
reservation responsible successful suggestion unfortunately usually convince persuade introduce
"""
"""Common English, so that the tokenizer keeps text from outside the corpus in few pieces."""
