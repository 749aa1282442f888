//! What becomes of the users when gateways die, restart, or everybody comes at once: the product's allocation in virtual time,
//! without a network. It also measures how many allocations a core makes, and asserts what each algorithm promises.
//!
//! `cargo bench --bench simulate` simulates 100 million users on 1,000 gateways, of whom one in fifty is a simulated one: rates
//! and capacities are a fiftieth, too, and figures are told times fifty. `cargo test` does the same with few.

#[path = "simulate/world.rs"]
mod world;

use std::collections::BTreeMap;
use std::time::Instant;

use im_presence::domain::allocation::Ask;
use im_presence::domain::allocation::algorithm::Algorithm;
use im_presence::domain::allocation::experiment::Experiment;
use im_presence::domain::gateway::Profile;
use im_presence::domain::id::UserId;

use crate::world::SECOND;
use crate::world::World;
use crate::world::number;
use crate::world::rules;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const NODES: usize = 4;
const REGIONS: [&str; 4] = ["eu", "us", "ap", "sa"];
/// Log-ins per second that each gateway likes.
const LOGIN_RATE: u32 = 500;
const USERS_PER_GATEWAY: u32 = 100_000;
const CAPACITY: u32 = 200_000;
/// Allocations from which on their rate means something.
const MEASURED: u64 = 1_000_000;
/// Allocations per second of one core with the default algorithm.
const PROMISED_RATE: f64 = 50_000.0;

/// How large the simulation is.
#[derive(Clone, Copy)]
struct Scale {
    gateways: usize,
    /// Users that one simulated user stands for.
    sample: u32,
}

fn main() {
    let measuring = std::env::args().any(|arg| arg == "--bench");
    let scale = if measuring { Scale { gateways: 1_000, sample: 50 } } else { Scale { gateways: 40, sample: 500 } };
    throughput(if measuring { MEASURED } else { 1_000 });
    promises(if measuring { 100_000 } else { 10_000 });
    death_of_one(if measuring { 1 } else { 20 });
    println!("\n| scenario | algorithm | log-ins | worst second of a gateway | until all are back, s | max/mean |");
    println!("|---|---|---|---|---|---|");
    for algorithm in Algorithm::ALL {
        of_a_part(scale, algorithm);
        of_a_region(scale, algorithm);
        rolling_restart(scale, algorithm);
        flash_crowd(scale, algorithm);
    }
    println!("test result: ok. {} gateways", scale.gateways);
}

fn profile(n: usize, sample: u32) -> Profile {
    let (region, capacity) = (REGIONS[n % REGIONS.len()].to_owned(), CAPACITY / sample);
    Profile { region, capacity, ..Profile::default() }
}

fn world(scale: Scale, algorithm: Algorithm, users: u32) -> World {
    let profiles = (0..scale.gateways).map(|n| profile(n, scale.sample));
    let mut world = World::new(NODES, profiles, &rules(algorithm), LOGIN_RATE / scale.sample);
    world.settle(users / scale.sample);
    world.run(6); // everybody has beaten
    world
}

fn tell(scenario: &str, algorithm: Algorithm, scale: Scale, world: &World, seconds: u64) {
    let sample = u64::from(scale.sample);
    let (came, worst, imbalance) = (world.came * sample, u64::from(world.worst_second()) * sample, world.imbalance());
    println!("| {scenario} | {} | {came} | {worst} | {seconds} | {imbalance:.3} |", algorithm.name());
}

/// One in a hundred dies at once.
fn of_a_part(scale: Scale, algorithm: Algorithm) {
    let mut world = world(scale, algorithm, USERS_PER_GATEWAY);
    (0..scale.gateways).step_by(100).for_each(|at| _ = world.dies(at));
    let seconds = world.run_until_quiet(600);
    tell("death of 1 %", algorithm, scale, &world, seconds);
}

/// All of a region die at once.
fn of_a_region(scale: Scale, algorithm: Algorithm) {
    let mut world = world(scale, algorithm, USERS_PER_GATEWAY);
    (0..scale.gateways).step_by(REGIONS.len()).for_each(|at| _ = world.dies(at));
    let seconds = world.run_until_quiet(1_200);
    tell("death of a region", algorithm, scale, &world, seconds);
}

/// One in a hundred after the other stops for 20 s; 30 s lie between them.
fn rolling_restart(scale: Scale, algorithm: Algorithm) {
    let mut world = world(scale, algorithm, USERS_PER_GATEWAY);
    let (began, at_once) = (world.now / SECOND, (scale.gateways / 100).max(1));
    let all: Vec<usize> = (0..scale.gateways).collect();
    for batch in all.chunks(at_once) {
        batch.iter().for_each(|at| _ = world.stops(*at));
        world.run(20);
        batch.iter().for_each(|at| world.starts(*at));
        world.run(10);
    }
    world.run_until_quiet(600);
    let seconds = world.now / SECOND - began;
    tell("rolling restart", algorithm, scale, &world, seconds);
}

/// A fifth of all users log in within ten seconds.
fn flash_crowd(scale: Scale, algorithm: Algorithm) {
    let mut world = world(scale, algorithm, USERS_PER_GATEWAY / 5 * 4);
    let users = scale.gateways * (USERS_PER_GATEWAY / 5 / scale.sample) as usize;
    world.ask(users, 10 * SECOND);
    let seconds = world.run_until_quiet(600);
    tell("flash crowd", algorithm, scale, &world, seconds);
}

/// Allocations of one thread, with a thousand gateways in four regions.
fn throughput(count: u64) {
    println!("| algorithm | allocations/s of one core, 1,000 gateways |");
    println!("|---|---|");
    for algorithm in Algorithm::ALL {
        let profiles = (0..1_000).map(|n| profile(n, 1));
        let mut world = World::new(1, profiles, &rules(algorithm), LOGIN_RATE);
        world.settle(USERS_PER_GATEWAY);
        world.run(6);
        let began = Instant::now();
        for user in 0..count {
            world.now += 20;
            if user % 50_000 == 0 {
                world.run(1); // the table is read once a second
            }
            let offers = world.allocate(0, &someone(user)).offers;
            assert_eq!(offers.len(), 3, "{algorithm:?}");
        }
        let rate = count as f64 / began.elapsed().as_secs_f64();
        println!("| {} | {rate:.0} |", algorithm.name());
        let is_promised = algorithm == Algorithm::TwoChoices && count >= MEASURED;
        assert!(!is_promised || rate >= PROMISED_RATE, "{algorithm:?}: {rate}");
    }
}

fn someone(user: u64) -> Ask {
    Ask::of(UserId::parse(user as i64 + 1).expect("a user"))
}

/// What is promised whatever the machine.
fn promises(users: u64) {
    println!("\n| promise | measured |");
    println!("|---|---|");
    for (what, weights, capacities) in
        [("weights 1 : 3", [100, 300], [1_000_000, 1_000_000]), ("capacities 1 : 3", [100, 100], [1_000_000, 3_000_000])]
    {
        let profiles = (0..2).map(|n| Profile { weight: weights[n], capacity: capacities[n], ..Profile::default() });
        let mut world = World::new(2, profiles, &rules(Algorithm::TwoChoices), 0);
        world.ask(users as usize, 100 * SECOND);
        world.run_until_quiet(200);
        let share = f64::from(world.gateways[1].connections) / world.came as f64;
        println!("| {what}, two nodes that do not talk: share of the second | {share:.4} of 0.75 |");
        assert!((0.675..=0.825).contains(&share), "{share}");
    }
    let mut even = World::new(NODES, (0..100).map(|n| profile(n, 1)), &rules(Algorithm::TwoChoices), 0);
    even.ask(users as usize * 2, 100 * SECOND);
    even.run_until_quiet(200);
    println!("| two_choices, {NODES} nodes, 100 gateways: max/mean | {:.3} |", even.imbalance());
    assert!(even.imbalance() <= if users < 100_000 { 1.3 } else { 1.1 }, "{}", even.imbalance());
    newcomers(users);
    rendezvous(users);
    let experiment = Experiment { name: "canary".to_owned(), share: 0.05, algorithm: None, labels: BTreeMap::new() };
    let canaries = (1..=1_000_000).filter(|user| experiment.includes(UserId::parse(*user).expect("a user"))).count();
    println!("| experiment with a share of 5 %, of a million users | {:.3} % |", canaries as f64 / 10_000.0);
    assert!((47_000..=53_000).contains(&canaries), "{canaries}");
}

/// Two of 20 gateways are new and empty, and 2,000 users log in a second.
fn newcomers(users: u64) {
    let mut world = World::new(NODES, (0..20).map(|n| profile(n, 1)), &rules(Algorithm::TwoChoices), 0);
    world.settle(users as u32 / 10);
    (0..2).for_each(|new| (world.gateways[new].connections, world.gateways[new].said) = (0, 0));
    world.run(6);
    let seconds = users / 500;
    world.ask(2_000 * seconds as usize, seconds * SECOND);
    world.run_until_quiet(2 * seconds);
    let (imbalance, worst) = (world.imbalance(), f64::from(world.worst_second()) / 100.0);
    println!(
        "| two_choices, {NODES} nodes, 2 of 20 gateways new: max/mean; worst second by the mean | {imbalance:.3}; {worst:.2} |"
    );
    assert!(imbalance <= if users < 100_000 { 1.1 } else { 1.02 } && worst <= 2.5, "{imbalance} {worst}");
}

fn rendezvous(users: u64) {
    let homes = |gateways: usize| {
        let profiles = (0..gateways).map(|_| Profile { capacity: 10_000_000, ..Profile::default() });
        let mut world = World::new(1, profiles, &rules(Algorithm::Rendezvous), 0);
        world.run(1);
        let homes: Vec<usize> = (0..users)
            .map(|user| {
                let offers = world.allocate(0, &someone(user)).offers;
                let at = number(&offers[0].life.gateway).expect("a number");
                world.gateways[at].connections += 1;
                at
            })
            .collect();
        (homes, world.imbalance())
    };
    let ((ten, fullest), (nine, fullest_of_nine)) = (homes(10), homes(9));
    let moved = ten.iter().zip(&nine).filter(|(ten, nine)| ten != nine).count() as f64 / users as f64;
    println!("| rendezvous, one of 10 gateways goes: users who move | {:.2} % |", moved * 100.0);
    println!("| rendezvous: max/mean of 10, of 9 | {fullest:.3}, {fullest_of_nine:.3} |");
    assert!(moved <= 1.3 / 9.0 && fullest <= 1.25 && fullest_of_nine <= 1.25, "{moved} {fullest} {fullest_of_nine}");
}

/// A gateway with 100,000 users dies, and ten others take 500 log-ins a second each; or as many as come.
fn death_of_one(sample: u32) {
    println!(
        "\n| a gateway with 100,000 users dies, 10 others, 2 nodes | most log-ins of one in a second | until all are back, s |"
    );
    println!("|---|---|---|");
    for (what, rate) in [("login_rate 500", LOGIN_RATE / sample), ("without pacing", 0)] {
        for algorithm in Algorithm::ALL {
            let profiles = (0..11).map(|_| Profile { capacity: CAPACITY / sample, ..Profile::default() });
            let mut world = World::new(2, profiles, &rules(algorithm), rate);
            world.settle(USERS_PER_GATEWAY / sample);
            world.run(6);
            let began = world.now;
            let users = world.dies(0);
            world.run_until_quiet(600);
            assert_eq!(world.came, users as u64, "everybody is back");
            let (worst, took) = (world.worst_second() * sample, (world.last_came - began) as f64 / SECOND as f64);
            println!("| {what}, {} | {worst} | {took:.1} |", algorithm.name());
            // Clients take up to 0.3 s to connect; with many it evens out.
            let most = if sample == 1 { 550 } else { (rate * 13 / 10 + 2) * sample };
            assert!(rate == 0 || worst <= most, "{algorithm:?}: {worst} of {most}");
        }
    }
}
