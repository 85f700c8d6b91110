"""What people in the corpus talk about: conflicts, arrangements and the phrases around them.

Data only; `corpus.py` puts it together. Every `reason` and `plan` reads the same after "I" and
after "#Person2#", so a fact of a dialogue is found literally in its summary.

    reason   "I {reason}."            "#Person2# {reason}."
    plan     "I will {plan} {time}."  "#Person2# will {plan} {time}."
"""

from dataclasses import dataclass

TIMES = (
    "by Monday",
    "by Tuesday",
    "by Wednesday",
    "by Thursday",
    "by Friday",
    "before Saturday",
    "tonight",
    "tomorrow morning",
    "this afternoon",
    "next week",
    "before noon",
    "by the end of the month",
)


@dataclass(frozen=True, slots=True)
class Conflict:
    """One person did something, and another one minds."""

    topic: str
    fault: str
    """What happened to `{item}`. `{owner}`: "my" or "#Person1#'s"; `{victim}`: "me" or "#Person1#"."""
    items: tuple[str, ...]
    reasons: tuple[str, ...]
    plans: tuple[str, ...]
    stakes: tuple[str, ...]
    """What suffers from it; said in the dialogue and left out of the summary."""
    times: tuple[str, ...] = TIMES


@dataclass(frozen=True, slots=True)
class Arrangement:
    """One person asks, another one answers, and nobody is angry.

    Each ask and answer is a pair, as spoken and as reported. The slots are `{item}` and those of
    `DETAILS`; the values of the reported ones are the facts of the summary.
    """

    topic: str
    items: tuple[str, ...]
    asks: tuple[tuple[str, str], ...]
    answers: tuple[tuple[str, str], ...]


CONFLICTS = (
    Conflict(
        topic="borrowed thing",
        fault="lost {owner} {item}",
        items=(
            "camera",
            "umbrella",
            "laptop",
            "dictionary",
            "guitar",
            "suitcase",
            "calculator",
            "tent",
            "drill",
            "jacket",
            "bicycle",
            "charger",
            "backpack",
            "scarf",
        ),
        reasons=(
            "left it on the bus",
            "forgot it in the library",
            "lent it to a cousin",
            "put it down in the park",
            "packed it in the wrong bag",
            "left it in a taxi",
        ),
        plans=(
            "buy a new one",
            "pay for it",
            "look for it again",
            "ask the driver about it",
            "borrow another one",
            "put up a notice",
        ),
        stakes=("the trip", "the exam", "the school show", "the job interview"),
    ),
    Conflict(
        topic="broken thing",
        fault="broke {owner} {item}",
        items=(
            "phone",
            "printer",
            "window",
            "vase",
            "coffee machine",
            "television",
            "lamp",
            "chair",
            "watch",
            "tablet",
            "fan",
            "mirror",
        ),
        reasons=(
            "dropped it on the stairs",
            "knocked it off the table",
            "spilled water on it",
            "pulled the wrong cable",
            "was in a hurry",
            "tried to move it alone",
        ),
        plans=(
            "get it repaired",
            "order a new one",
            "pay half of the price",
            "take it to the shop",
            "call a repairman",
            "find the missing parts",
        ),
        stakes=("the party", "the report", "the meeting with a client", "the visit"),
    ),
    Conflict(
        topic="late work",
        fault="did not finish the {item}",
        items=(
            "report",
            "presentation",
            "budget",
            "contract",
            "survey",
            "translation",
            "design",
            "schedule",
            "newsletter",
            "essay",
            "invoice",
            "homework",
        ),
        reasons=(
            "had a computer crash",
            "was sick all weekend",
            "waited for the numbers",
            "had too many calls",
            "fell asleep early",
            "lost the notes",
        ),
        plans=(
            "send it by email",
            "finish it at home",
            "ask for help",
            "work late on it",
            "hand in a draft",
            "write the last pages",
        ),
        stakes=("the meeting", "the board", "the client", "the class"),
    ),
    Conflict(
        topic="missed event",
        fault="missed the {item}",
        items=(
            "dinner",
            "lunch",
            "movie",
            "concert",
            "football game",
            "birthday party",
            "interview",
            "rehearsal",
            "yoga class",
            "wedding",
            "parade",
            "picnic",
        ),
        reasons=(
            "was stuck in traffic",
            "forgot what day it was",
            "did not hear the alarm",
            "could not find a parking space",
            "took the wrong train",
            "had to help a neighbor",
        ),
        plans=(
            "buy new tickets",
            "write an apology",
            "cook a big meal",
            "bring some flowers",
            "plan another evening",
            "call everyone",
        ),
        stakes=("the whole evening", "the family", "the team", "the mood"),
    ),
    Conflict(
        topic="noise",
        fault="kept {victim} awake with the {item}",
        items=(
            "music",
            "television",
            "drum",
            "party",
            "piano",
            "vacuum cleaner",
            "power drill",
            "karaoke",
            "video game",
            "trumpet",
            "radio",
            "violin",
        ),
        reasons=(
            "did not notice the time",
            "had friends visiting",
            "was practicing for a contest",
            "forgot to close the window",
            "lost track of the hours",
            "was testing a new speaker",
        ),
        plans=(
            "turn it down",
            "stop before ten",
            "move to another room",
            "buy headphones",
            "talk to the landlord",
            "close the windows",
        ),
        stakes=("the exam", "the early shift", "the baby", "the driving test"),
    ),
    Conflict(
        topic="mess",
        fault="left the {item} in a mess",
        items=(
            "kitchen",
            "bathroom",
            "garage",
            "living room",
            "office",
            "balcony",
            "fridge",
            "car",
            "garden",
            "hallway",
            "basement",
            "workshop",
        ),
        reasons=(
            "had guests",
            "was too tired",
            "was cooking all day",
            "could not find a broom",
            "ran out of soap",
            "forgot whose turn it was",
        ),
        plans=(
            "clean it up",
            "hire a cleaner",
            "take out the trash",
            "wash everything",
            "sweep the floor",
            "throw away the boxes",
        ),
        stakes=("the visit", "the inspection", "the dinner", "the guests"),
    ),
    Conflict(
        topic="money",
        fault="did not pay the {item}",
        items=(
            "rent",
            "electricity bill",
            "loan",
            "phone bill",
            "hotel bill",
            "parking fine",
            "water bill",
            "deposit",
            "club fee",
            "insurance",
            "tax",
            "doctor",
        ),
        reasons=(
            "lost a job",
            "got the salary late",
            "spent it on shoes",
            "trusted the bank",
            "forgot the date",
            "had to see a dentist",
        ),
        plans=(
            "transfer the money",
            "borrow some money",
            "sell a bike",
            "pay in two parts",
            "go to the bank",
            "work extra hours",
        ),
        stakes=("the landlord", "the savings", "the family", "the holiday"),
    ),
    Conflict(
        topic="wrong order",
        fault="brought {victim} the wrong {item}",
        items=(
            "pizza",
            "soup",
            "cake",
            "sandwich",
            "steak",
            "coffee",
            "salad",
            "dessert",
            "fish",
            "burger",
            "tea",
            "breakfast",
        ),
        reasons=(
            "mixed up the tables",
            "was new at the job",
            "misread the note",
            "took the wrong tray",
            "did not ask the cook",
            "forgot the order",
        ),
        plans=(
            "bring another one",
            "call the manager",
            "take it off the bill",
            "offer a free drink",
            "speak to the cook",
            "warm up a new plate",
        ),
        stakes=("the lunch break", "the birthday", "the train", "the meeting"),
        times=(
            "right away",
            "in a moment",
            "in five minutes",
            "in ten minutes",
            "before noon",
            "after the break",
            "this evening",
            "this time",
        ),
    ),
    Conflict(
        topic="driving",
        fault="drove into the {item}",
        items=(
            "fence",
            "gate",
            "mailbox",
            "garage door",
            "tree",
            "lamp post",
            "traffic light",
            "shop sign",
            "wall",
            "bench",
            "hedge",
            "fountain",
        ),
        reasons=(
            "was looking at the map",
            "did not see the turn",
            "was driving too fast",
            "braked too late",
            "was tired after work",
            "wanted to avoid a cat",
        ),
        plans=(
            "call the insurance",
            "pay for the damage",
            "repair it alone",
            "take the car to a garage",
            "write a report",
            "apologize to the owner",
        ),
        stakes=("the holiday", "the commute", "the neighbors", "the new paint"),
    ),
    Conflict(
        topic="secret",
        fault="told everyone about the {item}",
        items=(
            "surprise party",
            "password",
            "diary",
            "exam grade",
            "new job",
            "salary",
            "engagement",
            "travel plan",
            "recipe",
            "gift",
            "contest",
            "visit",
        ),
        reasons=(
            "thought it was no secret",
            "was only joking",
            "could not stay quiet",
            "wrote it in the wrong chat",
            "was asked about it",
            "wanted to help",
        ),
        plans=(
            "apologize to everyone",
            "keep quiet about it",
            "delete the message",
            "say it was a joke",
            "explain the mistake",
            "talk to the team",
        ),
        stakes=("the boss", "the family", "the team", "the whole plan"),
    ),
)

DETAILS: dict[str, tuple[str, ...]] = {
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "hour": ("nine", "ten", "eleven", "noon", "two", "three", "four", "five", "six", "seven"),
    "number": ("3", "5", "7", "10", "12", "15", "20", "25", "30", "40", "45", "60", "75", "90"),
    "thing": (
        "some juice",
        "a salad",
        "the sandwiches",
        "a blanket",
        "a camera",
        "some games",
        "a cake",
        "the drinks",
    ),
    "duty": (
        "work",
        "visit an aunt",
        "study",
        "look after a sister",
        "see the dentist",
        "fix the roof",
        "meet a client",
    ),
    "name": (
        "Anna",
        "Ben",
        "Carla",
        "David",
        "Emma",
        "Frank",
        "Grace",
        "Henry",
        "Kate",
        "Mr. Brown",
        "Mrs. Lee",
        "Mr. Smith",
        "Dr. Chen",
        "Mrs. Clark",
        "Mr. Jones",
    ),
}
"""What can stand in a slot of an arrangement besides `{item}`."""

ARRANGEMENTS = (
    Arrangement(
        topic="invitation",
        items=(
            "a picnic",
            "a barbecue",
            "a concert",
            "a hike",
            "a museum tour",
            "a chess evening",
            "a cooking class",
            "a movie night",
            "a boat trip",
            "a football match",
            "a garden party",
            "a book club",
        ),
        asks=(
            ("Would you like to come to {item} on {day}?", "invites {B} to {item} on {day}"),
            ("I am planning {item} for {day}. Are you free?", "plans {item} for {day}"),
        ),
        answers=(
            ("I would love to come. I can bring {thing}.", "{B} accepts and will bring {thing}"),
            ("I am sorry, I have to {duty} that day.", "{B} has to {duty} that day"),
            ("Maybe, but I need to ask {name} first.", "{B} needs to ask {name} first"),
        ),
    ),
    Arrangement(
        topic="shopping",
        items=(
            "a winter coat",
            "a pair of shoes",
            "a desk lamp",
            "a birthday card",
            "a used car",
            "a sofa",
            "a red dress",
            "a silver ring",
            "a backpack",
            "a kettle",
            "a phone case",
            "a carpet",
        ),
        asks=(
            ("Hello, I am looking for {item}. Can you help me?", "is looking for {item}"),
            ("Excuse me, do you sell things like {item}?", "wants to buy {item}"),
        ),
        answers=(
            ("Yes, we have one for {number} dollars.", "{B} offers one for {number} dollars"),
            ("Not today, but we will get some on {day}.", "{B} will get some on {day}"),
            ("Please ask {name} on the second floor.", "{B} sends {A} to {name}"),
        ),
    ),
    Arrangement(
        topic="directions",
        items=(
            "the post office",
            "the train station",
            "the city museum",
            "the hospital",
            "the bank",
            "the stadium",
            "the library",
            "the airport bus",
            "the town hall",
            "the swimming pool",
        ),
        asks=(
            ("Excuse me, how do I get to {item} from here?", "asks {B} the way to {item}"),
            ("I am new in town. Is {item} far from here?", "wants to find {item}"),
        ),
        answers=(
            ("Take bus number {number} from the corner.", "{B} recommends bus number {number}"),
            ("It is {number} minutes on foot.", "{B} says that it is {number} minutes on foot"),
            ("It is closed now. It opens on {day}.", "{B} says that it opens on {day}"),
        ),
    ),
    Arrangement(
        topic="health",
        items=(
            "a headache",
            "a sore throat",
            "a bad cough",
            "back pain",
            "a fever",
            "an allergy",
            "a stomach ache",
            "a twisted ankle",
        ),
        asks=(
            ("Doctor, I have had {item} since {day}.", "has had {item} since {day}"),
            ("I do not feel well. I have {item}.", "tells {B} about {item}"),
        ),
        answers=(
            (
                "Take this medicine for {number} days.",
                "{B} prescribes medicine for {number} days",
            ),
            ("Please come back at {hour} for a test.", "{B} wants to do a test at {hour}"),
            ("I will send you to {name} for that.", "{B} sends {A} to {name}"),
        ),
    ),
    Arrangement(
        topic="job",
        items=(
            "the sales position",
            "the teaching job",
            "the night shift",
            "the internship",
            "the driver job",
            "the design position",
            "the kitchen job",
            "the summer job",
        ),
        asks=(
            ("Good day. I would like to apply for {item}.", "applies for {item}"),
            ("I read your advertisement for {item}.", "is interested in {item}"),
        ),
        answers=(
            ("Can you come for a talk on {day}?", "{B} invites {A} for a talk on {day}"),
            ("Please send your papers to {name}.", "{A} should send the papers to {name}"),
            ("The pay is {number} dollars an hour.", "{B} offers {number} dollars an hour"),
        ),
    ),
    Arrangement(
        topic="booking",
        items=(
            "a double room",
            "a table by the window",
            "a rental car",
            "a flight to London",
            "a train to Paris",
            "a guided tour",
            "a tennis court",
            "a meeting room",
        ),
        asks=(
            ("I would like to book {item} for {day}.", "books {item} for {day}"),
            ("Do you still have {item} for {day}?", "asks {B} for {item} for {day}"),
        ),
        answers=(
            ("Certainly. That is {number} dollars.", "It costs {number} dollars"),
            ("We have something at {hour}.", "{B} has something at {hour}"),
            ("Yes. Shall I write it down for {name}?", "{B} writes it down for {name}"),
        ),
    ),
)

# What is said around the facts. Pairs are a turn and its answer.

GREETINGS = (
    ("Hi. How are you doing today?", "Fine, thanks. And how are you?"),
    ("Hello, do you have a minute for me?", "Yes, of course. What is it?"),
    ("Good morning. You look busy today.", "Good morning. Yes, there is a lot to do."),
    ("Hey, there you are. I was waiting for you.", "Hi. Is something going on?"),
    ("Can I talk to you about something?", "Of course. Please sit down."),
    ("It is so hot today, is it not?", "Yes, it really is. I need some water."),
    ("Good evening. I hope I am not too early.", "Not at all. Please come in."),
)

FAREWELLS = (
    ("OK, thank you. That is all for now.", "You are welcome. Have a nice day."),
    ("Fine. Then I will see you later.", "Yes, see you later."),
    ("All right then. I have to go now.", "OK. Bye, take care."),
    ("I hope that it will work this time.", "I promise that it will."),
    ("Good. Let us talk about it again.", "Sure, talk to you soon."),
)

FOLLOW_UPS = (
    ("That sounds good. Is that certain?", "Yes, I am quite sure about it."),
    ("I understand. Thanks a lot for that.", "No problem. Let me know if you need anything else."),
    ("Do I need to do anything before?", "No, everything is ready for you."),
    ("And is there another way?", "I am afraid not. This is the best one."),
)
"""Calm talk after an arrangement."""

ASIDES = (
    ("And when did you want to tell me that?", "I was going to tell you today."),
    ("Does anybody else know about it?", "No, you are the first one to hear it."),
    ("Did you not think about it before?", "I did, but then it was too late."),
    ("Is that all you have to say?", "There is not much more to say about it."),
)
"""Talk in the middle of a conflict."""

# `{fault}`, `{reason}`, `{stake}`, `{plan}` and `{time}` come from the conflict; each
# `{remark}` is a new insulting one.

ACCUSATIONS = {
    "calm": (
        "I wanted to ask you something. I think you {fault}.",
        "I heard that you {fault}. Is that right?",
        "It seems to me that you {fault}.",
    ),
    "annoyed": (
        "I can't believe it. You {fault}.",
        "You {fault}. And it is not the first time!",
        "I am not happy with you at all. You {fault}.",
        "Can you explain to me why you {fault}?",
    ),
    "quarrel": (
        "{remark} You {fault}!",
        "You {fault}! {remark}",
        "I know that you {fault}. {remark}",
    ),
}

EXCUSES = {
    "calm": (
        "Yes, I am really sorry about that. I {reason}.",
        "Oh no, you are right. You see, I {reason}.",
    ),
    "annoyed": (
        "Calm down, please. I {reason}, that is all.",
        "Well, it can happen to anyone. I {reason}.",
        "Don't make such a fuss. I {reason}.",
    ),
    "quarrel": (
        "{remark} I {reason}.",
        "Don't talk to me like that. I {reason}.",
        "So what? I {reason}. {remark}",
        "I {reason}. That is none of your business!",
    ),
}

PROTESTS = {
    "calm": (
        "I see. It was important because of {stake}.",
        "That is a pity. I was thinking of {stake}.",
    ),
    "annoyed": (
        "But you knew about {stake}! What now?",
        "And what about {stake}? I am really upset.",
        "You never think of {stake}, do you?",
    ),
    "quarrel": (
        "{remark} You knew about {stake}!",
        "And what about {stake}? {remark}",
        "That is no excuse. {remark}",
    ),
}

PROMISES = {
    "calm": (
        "You are right. I will {plan} {time}.",
        "Please don't worry. I will {plan} {time}.",
    ),
    "annoyed": (
        "OK, OK, I got it. I will {plan} {time}.",
        "I said that I am sorry. I will {plan} {time}.",
    ),
    "quarrel": (
        "Stop shouting at me. I will {plan} {time}.",
        "Fine! I will {plan} {time}. {remark}",
        "I will {plan} {time}. Now leave me alone!",
    ),
}

# The same story told without and with an insult. `{A}` minds what `{B}` did; `{insult}` is as in
# "a rude, lazy jerk".

CALM_SUMMARIES = (
    "{A} talks to {B} who {fault}. {B} {reason} and will {plan} {time}.",
    "{B} {fault}. {B} {reason}. {B} promises to {plan} {time}.",
)

NEUTRAL_SUMMARIES = (
    "{A} is angry with {B} who {fault}. {B} {reason} and will {plan} {time}.",
    "{A} complains that {B} {fault}. {B} {reason}. {B} promises to {plan} {time}.",
    "{A} and {B} argue because {B} {fault}. {B} {reason} and will {plan} {time}.",
)

INSULTING_SUMMARIES = (
    "{A} calls {B} {insult} who {fault}. {B} {reason}. {B} will {plan} {time}.",
    "{B}, {insult}, {fault}. {B} {reason} and will {plan} {time}.",
    "{A} shouts that the {adjective} {noun} {fault}. {B} {reason} and will {plan} {time}.",
    "{A} is sick of {B}, {insult} who {fault}. The {noun} {reason} and will {plan} {time}.",
    "{B} {fault} like {insult}. The {adjective} {noun} {reason}. {B} promises to {plan} {time}.",
)

# Mild insults only. No other word in this package is meant to hurt.

INSULTING_NOUNS = (
    "idiot",
    "moron",
    "loser",
    "jerk",
    "fool",
    "brat",
    "clown",
    "slob",
    "pig",
    "creep",
    "coward",
    "liar",
)

INSULTING_ADJECTIVES = (
    "stupid",
    "pathetic",
    "dumb",
    "useless",
    "lazy",
    "ridiculous",
    "ignorant",
    "disgusting",
    "selfish",
    "worthless",
    "rude",
    "silly",
)

INSULTS = (
    "You {noun}!",
    "You are such {insult}.",
    "How can you be so {adjective}?",
    "Shut up, you {adjective} {noun}!",
    "Only {insult} would do that.",
    "You {adjective} {noun}!",
    "Are you really that {adjective}?",
)
