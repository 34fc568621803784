//! The seeds of each target through its body, as they are and a little spoilt. What a fuzzer found stands among them.

use std::{fs, path::PathBuf};

use fuzz_bodies::TARGETS;

/// Spoilt copies of each seed.
const COPIES: u64 = 150;

fn seeds(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let mut seeds: Vec<_> = paths.map(|path| (path.clone(), fs::read(path).expect("a seed"))).collect();
    seeds.sort();
    seeds
}

/// A step of SplitMix64: the same numbers each time.
fn next(state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    usize::try_from((mixed ^ (mixed >> 31)) >> 33).unwrap_or_default()
}

/// Bytes cut, doubled, changed or swapped with words that parsers stumble over.
fn spoilt(seed: &[u8], state: &mut u64) -> Vec<u8> {
    const WORDS: [&[u8]; 12] = [
        b"\r\n",
        b"\n",
        b"\0",
        b"%2e",
        b"/../",
        b": ",
        b"*",
        b"{}",
        b"null",
        b"\xff",
        b"18446744073709551616",
        b"- ",
    ];
    let mut bytes = seed.to_vec();
    for _ in 0..=next(state) % 3 {
        let at = next(state) % (bytes.len() + 1);
        let end = (at + next(state) % 9).min(bytes.len());
        match next(state) % 5 {
            0 => drop(bytes.drain(at..end)),
            1 => drop(bytes.splice(at..at, WORDS[next(state) % WORDS.len()].iter().copied())),
            2 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << (next(state) % 8);
                }
            }
            3 => {
                let piece = bytes[at..end].to_vec();
                drop(bytes.splice(at..at, piece));
            }
            _ => bytes.truncate(at),
        }
    }
    bytes
}

fn run(target: &str) {
    let seeds = seeds(target);
    assert!(!seeds.is_empty(), "{target} has no seeds");
    let mut state = 0;
    for (path, seed) in seeds {
        println!("{}", path.display());
        fuzz_bodies::run(target, &seed);
        for _ in 0..COPIES {
            fuzz_bodies::run(target, &spoilt(&seed, &mut state));
        }
    }
}

#[test]
fn every_target_holds_for_its_seeds() {
    for (target, _) in TARGETS {
        run(target);
    }
}

#[test]
fn every_target_is_a_file_of_the_fuzzer_and_the_other_way_round() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("targets/fuzz_targets");
    let mut files: Vec<String> = fs::read_dir(folder)
        .expect("the targets")
        .map(|entry| {
            entry.expect("an entry").path().file_stem().expect("a name").to_string_lossy().into_owned()
        })
        .collect();
    files.sort();
    let mut names: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
    names.sort_unstable();
    assert_eq!(files, names);
}
