"""The words of the requests. Each pool has words for training and other words for the held-out requests.

Held-out requests test whether the model generalises, so a name, a city, a shopping item or a unit from training never occurs in
the evaluation. Most words are single tokens of SmolLM2, both with a space before them and without, because a word after a quote
has no space before it. With other words, the evaluation of such a small model would mainly test spelling.

Numbers, dates and clock times have no lists; ``is_held_out_number``, ``is_held_out_day`` and ``is_held_out_time`` split them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pool:
    """Values for training and values for the held-out requests, each written ``"a; b; c"``."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @classmethod
    def of(cls, train: str, held_out: str) -> Pool:
        return cls(*(tuple(" ".join(v.split()) for v in s.split(";")) for s in (train, held_out)))


def is_held_out_number(number: int) -> bool:
    """Whether a count, a duration or the whole part of an amount belongs to the held-out requests (3, 9, 15, 21, …)."""
    return number % 6 == 3


def is_held_out_day(month: int, day: int) -> bool:
    """Whether a day of the year belongs to the held-out requests."""
    return (month + day) % 5 == 0


def is_held_out_time(hour: int, minute: int) -> bool:
    """Whether a time on the 24-hour clock belongs to the held-out requests."""
    return (hour + minute // 5) % 4 == 3


YEARS = {"train": (2026, 2027, 2028), "held_out": (2029, 2030)}

MONTHS = (
    "January February March April May June July August September October November December"
).split()

WEEKDAYS = Pool.of("Monday; Tuesday; Wednesday; Thursday; Saturday", "Friday; Sunday")

# Ways to phrase a request; ~ is replaced by the imperative.
MANNERS = Pool.of(
    """~.; please ~.; ~, please.; could you ~?; can you ~?; hey, ~.; I want you to ~.; ~, thanks.; ~ for me.""",
    "~; would you ~?; kindly ~.; I need you to ~.; ~ if you can.; okay, now ~.",
)

NEAR_DAYS = Pool.of(
    """today; tomorrow; this weekend; next month; next spring; this evening; next weekend; this
    summer; at Easter; later this week; on Christmas Eve; the day after Christmas; the week after
    next; the day before Easter; the weekend after next; the day of the wedding; the day before
    the exam""",
    "the day after tomorrow; next week; next autumn; this month",
)

PEOPLE = Pool.of(
    """Adam; Alex; Andrew; Ann; Anna; Arthur; Ben; Bill; Bob; Carl; Charles; Chris; Daniel; David;
    Edward; Elizabeth; Frank; Fred; Greg; Henry; Jack; Jacob; James; Jane; Jeff; Jim; John;
    Joseph; Ken; Leon; Julia; Eric; Oliver; Kevin; Laura; Patrick; Rachel; Roger; Ryan; Steve;
    Susan; Tim; Tony; Walter; Brian; Diana; Grace; Helen; Ian; Kate; Lisa; Linda; Nancy; Oscar;
    Rebecca; Ruth; Ted; Bruce; Claire; Gary; Jason; Joan; Joe; Jonathan; Justin; Larry; Lily; Louis; Maria; Mark; Martin; Mary; Matthew; Max; Michael; Neil;
    Paul; Peter; Richard; Robert; Sarah; Simon; Thomas; Tom; my sister; my boss; the landlord;
    the doctor; the dentist; the teacher; the baker; the nurse; the coach; the driver; the gardener;
    my uncle; my aunt; my cousin; my neighbour""",
    """Alice; Emily; George; Jean; Josh; Kim; Lee; Luke; Marie; Maya; Nick; Phil; Ray; Rose; Sam;
    Scott; Stephen; Victor; William; my brother; the plumber""",
)

CITIES = Pool.of(
    """London; Paris; Rome; Boston; Chicago; Oxford; Washington; New York; Los Angeles; Italy;
    Germany; France; Canada; Japan; China; Mexico; Brazil; Russia; England; Hungary; Texas;
    Florida; Israel; Pakistan; South Wales; West Virginia; Lake Como; Port Said; Fort Worth;
    Little Rock; Green Bay; Salt Lake City; Long Beach; Rapid City; Santa Fe; Palm Springs;
    Cape Town; Central Park; Cold Spring; Stone Town""",
    """Cambridge; India; Spain; California; Lincoln; San Diego; San Francisco; New Orleans; Fort
    William; Great Falls; Grand Rapids; Atlantic City; Long Island; North Dakota; East Anglia;
    White Plains""",
)

EVENTS = Pool.of(
    """budget review; team meeting; job interview; project kickoff; school meeting; book club; code
    review; quick lunch; board meeting; German class; car inspection; design workshop; tax
    consultation; family dinner; flat viewing; staff training; vet appointment; press
    briefing; physics tutorial; safety drill; contract signing; language course; science
    lecture; music lesson; client call; risk assessment; beach walk; road test; group session;
    history seminar; summer party; video call; street festival; farm visit; health check;
    court hearing""",
    """product demo; field test; blood test; film night; house warming; late brunch; network
    event; status update; card game; boat tour; security audit; student reunion; winter ball;
    wine tasting; trial lesson; game night""",
)

TASKS = Pool.of(
    """water the plants; call the bank; pay the electricity bill; take out the rubbish; feed the cat;
    renew my passport; book the hotel; send the invoice; charge the camera; walk the dog; pick
    up the dry cleaning; return the library books; back up my laptop; order new glasses; clean
    the fridge; buy stamps; check the tyres; cancel the gym membership; print the tickets;
    iron the shirts; update the spreadsheet; sign the lease; take my medicine; wash the car;
    reply to the survey; close the windows; turn off the heating; fix the bike; empty the
    dishwasher; write the minutes; lock the garage; measure the curtains; phone the school;
    post the parcel; change the bed sheets; top up my travel card; move the sofa; cut the
    hedge; read the contract; open the shop""",
    """collect the prescription; pay the rent; submit the timesheet; pack the suitcase; test the
    smoke alarm; download the boarding pass; thank the neighbours; book the plumber; oil the
    hinges; replace the light bulb; visit grandma; finish the essay; watch the documentary;
    buy a present; clear the gutters; answer the letter""",
)

MESSAGES = Pool.of(
    """the keys are under the mat; I am running late; the dinner is ready; the meeting has moved; we are out of coffee;
    the train is delayed; I found the charger; the parcel has arrived; my phone is nearly empty; the tickets are booked;
    I will bring dessert; the car is at the garage; practice is cancelled; the baby is asleep; I left the report on the desk;
    the flight has landed; we need more chairs; the heating works again; I can pick up the kids; the shop closes early;
    the password has changed; the lunch is on me; the doctor said yes; I am stuck in traffic; the cake turned out well;
    it is raining here; the printer is broken; I have the spare key; the exam went fine; the guests are waiting;
    we won the match; the water is off; I booked the table; the cat is back; the lift is out of order; I forgot my badge""",
    """the door code is new; I missed the bus; the soup is in the fridge; our flight was cancelled; the plumber is here;
    I will be there soon; the concert is sold out; the bike is repaired; she said no; the laundry is done;
    the road is closed; I need the address; the power is back; my grandpa feels better; the slides are finished;
    the kids are at home""",
)

ITEMS = Pool.of(
    """milk; rice; bread; apples; sugar; salt; beans; peas; corn; fish; green tea; orange juice; cat
    food; frozen pizza; brown sugar; black pepper; red onions; whole milk; hot sauce; baby
    carrots; paper towels; dark chocolate; hand soap; bird seed; plant food; dry yeast;
    organic eggs; sea salt; spring onions; raw honey; cooked ham; mixed spices; large
    tomatoes; fresh basil; soft cheese; thin noodles; plain flour; lean beef; cold cuts;
    coffee filters; strong glue; ice cream""",
    """nuts; jam; wine; dog food; apple juice; light bulbs; white vinegar; lime soda; wheat crackers;
    fruit salad; yellow mustard; smooth peanut butter; pure almond oil; glass cleaner; early
    potatoes; natural yoghurt; rose water; sweet corn syrup""",
)

UNITS = Pool.of(
    """packs; cans; bags; boxes; cases; pots; rolls; packages; bars; blocks; bins; grams; cups;
    bottles; pounds; inches; pints; litres""",
    "slices; sticks; samples; tons",
)

SHOPS = Pool.of(
    """the market; the pharmacy; the corner shop; the bakery; the supermarket; the kiosk; Target; the
    butcher; the garden centre; the petrol station; the fish shop; Amazon; Whole Foods; the
    mall; the health shop; the local store""",
    "the farm shop; the deli; the greengrocer; Best Buy",
)

MODES = Pool.of(
    """train; flight; bus; night train; boat; river cruise; van; car; fast train; plane; ship;
    private jet; direct flight; cable car; local bus; shared taxi; city tram; express train;
    green cab; tour bus; mail van; post bus; party boat; music bus; school bus; milk train; news
    helicopter""",
    "water taxi; small plane; free shuttle; mail boat",
)

WEATHER = Pool.of(
    """wind speed; snow depth; temperature; cloud cover; storm risk; air quality; water temperature;
    heat index; wave height; rain risk; sea level; sun index; air pressure; ice risk; light
    level; fire danger""",
    "dust level; moon phase; solar radiation; ground frost",
)

GENRES = Pool.of(
    """rock; classical; country; pop; punk; house; film music; hip hop; new wave; soft rock; smooth
    jazz; deep house; electronic; world music; organ music; heavy metal; early music; string
    quartets; winter hits; spring songs; party hits; slow waltz; Spanish guitar; modern jazz; club music; Latin""",
    "folk; African drums; Greek songs; acid house; slow swing; summer hits; dark ambient",
)

ARTISTS = Pool.of(
    """Queen; Prince; Bob Marley; Bob Dylan; David Bowie; Michael Jackson; Paul Simon; James Brown;
    Louis Armstrong; Frank Sinatra; John Lennon; Max Richter; Tom Waits; The Beatles; The
    Doors; Bill Evans; Robert Schumann; Carl Orff; Neil Young; Van Morrison; Taylor Swift;
    Fred Astaire; The Police; The Kinks; The Smiths; The Band; Van Halen; Elvis Presley; Joan Baez""",
    """Ray Charles; Sam Cooke; Nick Cave; George Gershwin; Phil Collins; The Clash; Alice Cooper;
    Scott Joplin; Victor Wooten""",
)

ROOMS = Pool.of(
    """living room; office; hall; library; lab; main bedroom; back room; front room; music room;
    shop; shed; green room; tower; school hall; lower kitchen; garage""",
    "study; media room; boat house; winter garden",
)

LABELS = Pool.of(
    """bread; rice; reading; face mask; soup; fish; black coffee; training; meal; walk; exercise;
    game; talk; sleep; speech; meditation; pasta; pizza""",
    "race; download; experiment; pie; chat; hair dye; egg; walking tour",
)

ALARMS = Pool.of(
    """gym; school run; early shift; airport; market; morning run; train; night bus; first lecture; sale;
    doctor; long drive; exam; hike; boat; game; late shift; night train; ferry; interview; parade; fishing
    trip; day shift; ski trip; wedding; delivery""",
    "night duty; road trip; harvest; webinar; flight home",
)

SUBJECTS = Pool.of(
    """summer plans; the tax form; the invoice; class notes; the new contract; travel costs; feedback; job offer; the broken lift;
    exam results; team lunch; website update; the lost parcel; photos; a refund; the parking permit; course schedule;
    the insurance claim; the heating; flat keys; the conference talk; draft report""",
    """school trip; the noisy pipes; next steps; budget cuts; the guest list; delivery address; library fine; room booking;
    press release; test data""",
)

EXPENSES = Pool.of(
    """train tickets; books; office supplies; museum tickets; printer ink; flowers; medicine; phone
    bill; food; gas; a taxi; a hotel; the dinner; software; paper; new shoes; car parking; bus
    fare; art supplies; internet; water bill; health insurance""",
    """film tickets; boat hire; road tolls; a visa fee; new headphones; fruit snacks; bank fees;
    house keys; client gifts""",
)

CURRENCIES = Pool.of(
    """dollars; euros; pounds; USD; CAD; rand; Canadian dollars; Australian dollars; Japanese yen; Russian roubles;
    Hungarian forints; EUR""",
    "Chinese yuan; Indian rupees; British pounds",
)

NOTES = Pool.of(
    """work; the client visit; the Berlin trip; home; the kids; training; the office party; the book
    fair; travel; the charity; the wedding; car costs; sales; the cottage; art; the spring
    sale""",
    "the school fair; research; the summer camp; the new flat",
)
