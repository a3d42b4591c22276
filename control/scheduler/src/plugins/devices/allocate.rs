//! Which devices satisfy the claims of a pod: one function of what there is and what is asked for.
//!
//! It is a search in a fixed order (claims, requests, alternatives, devices) and takes the first solution, as the reference
//! does: a request gets a later alternative only where those before it cannot be satisfied beside what came before. A bound on
//! its steps keeps a claim made to be hard from stopping the scheduler.

use std::collections::BTreeMap;

/// Devices looked at before a search is given up.
const MAX_STEPS: usize = 200_000;
/// Devices of one claim (`AllocationResultsMaxSize`).
pub(super) const MAX_RESULTS: usize = 32;

/// A device that a node can reach.
#[derive(Clone, Debug, Default)]
pub(super) struct Device {
    /// Somebody has it, or for a device that is shared a part of it.
    pub(super) taken: bool,
    /// Several may have parts of it.
    pub(super) shared: bool,
    /// What it draws on what it shares with others, by place of the counter.
    pub(super) draws: Vec<(usize, i128)>,
}

/// One way to satisfy a request.
#[derive(Clone, Debug, Default)]
pub(super) struct Alternative {
    /// `None`: all that fit.
    pub(super) count: Option<usize>,
    /// Devices that fit, in order.
    pub(super) fits: Vec<usize>,
    /// What it draws on counters for its part of a device that is shared.
    pub(super) portions: BTreeMap<usize, Vec<(usize, i128)>>,
    /// Devices are not taken but only looked after.
    pub(super) admin: bool,
    /// Constraints of its claim that it is under.
    pub(super) constraints: Vec<usize>,
}

/// What the devices of some requests must have in common, or must not.
#[derive(Clone, Debug)]
pub(super) struct Constraint {
    pub(super) same: bool,
    /// By device the value of the attribute, as a number for each that occurs.
    pub(super) values: BTreeMap<usize, usize>,
}

/// A claim.
#[derive(Clone, Debug, Default)]
pub(super) struct Claim {
    /// Alternatives of each request, the preferred first.
    pub(super) requests: Vec<Vec<Alternative>>,
    pub(super) constraints: Vec<Constraint>,
}

/// The alternative of each request and its devices, claim by claim.
pub(super) type Solution = Vec<Vec<(usize, Vec<usize>)>>;

/// Why there is no solution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unsolved {
    /// There is none.
    Impossible,
    /// The search was given up.
    TooHard,
}

struct Search<'a> {
    claims: &'a [Claim],
    devices: &'a [Device],
    /// How many have each device, or a part of it.
    uses: Vec<usize>,
    /// What is left of each counter.
    counters: Vec<i128>,
    solution: Solution,
    steps: usize,
}

/// The first solution.
pub(super) fn allocate(claims: &[Claim], devices: &[Device], counters: &[i128]) -> Result<Solution, Unsolved> {
    let mut search = Search {
        claims,
        devices,
        uses: devices.iter().map(|device| usize::from(device.taken)).collect(),
        counters: counters.to_vec(),
        solution: vec![Vec::new(); claims.len()],
        steps: 0,
    };
    match search.request(0) {
        Ok(true) => Ok(search.solution),
        Ok(false) => Err(Unsolved::Impossible),
        Err(TooHard) => Err(Unsolved::TooHard),
    }
}

struct TooHard;

impl Search<'_> {
    /// Solves what is left, from the next request of the claim on.
    fn request(&mut self, claim: usize) -> Result<bool, TooHard> {
        let claims = self.claims;
        let Some(wanted) = claims.get(claim) else { return Ok(true) };
        let at = self.solution[claim].len();
        let Some(alternatives) = wanted.requests.get(at) else { return self.request(claim + 1) };
        for (number, alternative) in alternatives.iter().enumerate() {
            let held: usize = self.solution[claim].iter().map(|(_, devices)| devices.len()).sum();
            let count = alternative.count.unwrap_or(alternative.fits.len());
            // All of nothing is not what anybody asked for.
            if count == 0 || held + count > MAX_RESULTS {
                continue;
            }
            self.solution[claim].push((number, Vec::with_capacity(count)));
            if self.device(claim, alternative, 0, count)? {
                return Ok(true);
            }
            self.solution[claim].pop();
        }
        Ok(false)
    }

    /// Finds `left` more devices among those from `from` on, then goes on.
    fn device(&mut self, claim: usize, alternative: &Alternative, from: usize, left: usize) -> Result<bool, TooHard> {
        if left == 0 {
            return self.request(claim);
        }
        for at in from..alternative.fits.len() {
            // Of one that is shared several parts may do.
            if alternative.fits.len() - at < left && alternative.portions.is_empty() {
                return Ok(false);
            }
            self.steps += 1;
            if self.steps > MAX_STEPS {
                return Err(TooHard);
            }
            let device = alternative.fits[at];
            if self.may_have(claim, alternative, device) {
                self.take(claim, alternative, device);
                let again = self.devices[device].shared && alternative.count.is_some();
                if self.device(claim, alternative, if again { at } else { at + 1 }, left - 1)? {
                    return Ok(true);
                }
                self.give_back(claim, alternative, device);
            }
            if alternative.count.is_none() {
                // All of them means this one too.
                return Ok(false);
            }
        }
        Ok(false)
    }

    fn may_have(&self, claim: usize, alternative: &Alternative, device: usize) -> bool {
        let Device { shared, draws, .. } = &self.devices[device];
        let enough = |draws: &[(usize, i128)]| draws.iter().all(|(counter, amount)| self.counters[*counter] >= *amount);
        // What a device draws for itself it draws once, however many share it.
        let may_share = match self.uses[device] {
            0 => enough(draws),
            _ => *shared,
        };
        let free = may_share && alternative.portions.get(&device).is_none_or(|draws| enough(draws));
        if !(free || alternative.admin) {
            return false;
        }
        alternative.constraints.iter().all(|number| {
            let constraint = &self.claims[claim].constraints[*number];
            let Some(value) = constraint.values.get(&device) else { return false };
            let others = self.solution[claim].iter().zip(&self.claims[claim].requests);
            let under = others.filter(|((number_of, _), all)| all[*number_of].constraints.contains(number));
            under
                .flat_map(|((_, devices), _)| devices)
                .all(|other| constraint.values.get(other).is_some_and(|held| (held == value) == constraint.same))
        })
    }

    fn take(&mut self, claim: usize, alternative: &Alternative, device: usize) {
        if let Some((_, devices)) = self.solution[claim].last_mut() {
            devices.push(device);
        }
        if !alternative.admin {
            self.uses[device] += 1;
            self.draw(alternative, device, 1);
        }
    }

    /// Draws what one more use of a device costs, or gives it back, while that use is counted.
    fn draw(&mut self, alternative: &Alternative, device: usize, times: i128) {
        let own = self.devices[device].draws.iter().filter(|_| self.uses[device] == 1);
        for (counter, amount) in own.chain(alternative.portions.get(&device).into_iter().flatten()) {
            self.counters[*counter] -= times * amount;
        }
    }

    fn give_back(&mut self, claim: usize, alternative: &Alternative, device: usize) {
        if let Some((_, devices)) = self.solution[claim].last_mut() {
            devices.pop();
        }
        if !alternative.admin {
            self.draw(alternative, device, -1);
            self.uses[device] -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All choices of alternatives in order, all sets of devices for each, tested as a whole: the first that is right.
    fn naive(claims: &[Claim], devices: &[Device], counters: &[i128]) -> Option<Vec<Vec<usize>>> {
        let requests: Vec<(usize, usize)> =
            (0..claims.len()).flat_map(|c| (0..claims[c].requests.len()).map(move |r| (c, r))).collect();
        let mut choices: Vec<Vec<usize>> = vec![Vec::new()];
        for (claim, request) in &requests {
            let count = claims[*claim].requests[*request].len();
            choices = choices.iter().flat_map(|c| (0..count).map(|n| [&c[..], &[n]].concat())).collect();
        }
        choices.into_iter().find_map(|choice| {
            let picked: Vec<&Alternative> =
                requests.iter().zip(&choice).map(|((c, r), n)| &claims[*c].requests[*r][*n]).collect();
            possible(claims, &requests, &picked, &mut Vec::new(), devices, counters).then(|| {
                let mut by_claim = vec![Vec::new(); claims.len()];
                requests.iter().zip(choice).for_each(|((claim, _), number)| by_claim[*claim].push(number));
                by_claim
            })
        })
    }

    fn possible(
        claims: &[Claim],
        requests: &[(usize, usize)],
        picked: &[&Alternative],
        sets: &mut Vec<Vec<usize>>,
        devices: &[Device],
        counters: &[i128],
    ) -> bool {
        let Some(alternative) = picked.get(sets.len()) else {
            return is_right(claims, requests, picked, sets, devices, counters);
        };
        let count = alternative.count.unwrap_or(alternative.fits.len());
        let choices = choices(&alternative.fits, count, alternative.count.is_some(), devices);
        choices.into_iter().filter(|set| !set.is_empty()).any(|set| {
            sets.push(set);
            let found = possible(claims, requests, picked, sets, devices, counters);
            sets.pop();
            found
        })
    }

    /// All ways to choose so many of these; one that is shared may be chosen again.
    fn choices(fits: &[usize], count: usize, again: bool, devices: &[Device]) -> Vec<Vec<usize>> {
        let Some((first, rest)) = fits.split_first() else {
            return if count == 0 { vec![Vec::new()] } else { Vec::new() };
        };
        let most = if again && devices[*first].shared { count } else { count.min(1) };
        let with = |times: usize| {
            let others = choices(rest, count - times, again, devices);
            others.into_iter().map(move |others| [vec![*first; times], others].concat())
        };
        (0..=most).flat_map(with).collect()
    }

    fn is_right(
        claims: &[Claim],
        requests: &[(usize, usize)],
        picked: &[&Alternative],
        sets: &[Vec<usize>],
        devices: &[Device],
        counters: &[i128],
    ) -> bool {
        let owned: Vec<usize> =
            picked.iter().zip(sets).filter(|(a, _)| !a.admin).flat_map(|(_, set)| set.clone()).collect();
        let once = owned.iter().filter(|d| !devices[**d].shared);
        let once = once.into_iter().all(|d| !devices[*d].taken && owned.iter().filter(|o| o == &d).count() == 1);
        let portions: Vec<(usize, i128)> = picked
            .iter()
            .zip(sets)
            .filter(|(a, _)| !a.admin)
            .flat_map(|(a, set)| set.iter().flat_map(|d| a.portions.get(d).cloned().unwrap_or_default()))
            .collect();
        // Those that were taken before draw already.
        let newly: std::collections::BTreeSet<usize> = owned.iter().filter(|d| !devices[**d].taken).copied().collect();
        let drawn = |counter: usize| -> i128 {
            let draws = newly.iter().flat_map(|d| &devices[*d].draws).chain(&portions);
            draws.filter(|(at, _)| *at == counter).map(|(_, amount)| amount).sum()
        };
        let enough = (0..counters.len()).all(|counter| drawn(counter) <= counters[counter]);
        let agree =
            claims.iter().enumerate().all(|(claim, wanted)| {
                wanted.constraints.iter().enumerate().all(|(number, constraint)| {
                    let under =
                        requests.iter().zip(picked).zip(sets).filter(|(((c, _), alternative), _)| {
                            *c == claim && alternative.constraints.contains(&number)
                        });
                    let values: Vec<Option<&usize>> =
                        under.flat_map(|(_, set)| set.iter().map(|d| constraint.values.get(d))).collect();
                    values.iter().enumerate().all(|(i, a)| {
                        a.is_some() && values[..i].iter().all(|b| b.is_some() && (a == b) == constraint.same)
                    })
                })
            });
        once && enough && agree
    }

    const DEVICES: usize = 5;
    /// So many of them, the first, are shared.
    const SHARED: usize = 2;

    fn alternatives() -> impl Strategy<Value = Alternative> {
        let count = prop_oneof![Just(None), (1..3_usize).prop_map(Some)];
        let fits = prop::collection::btree_set(0..DEVICES, 0..=DEVICES);
        let under = prop::collection::btree_set(0..2_usize, 0..=2);
        let portions = prop::collection::vec(0..3_i128, DEVICES);
        (count, fits, prop::bool::weighted(0.2), under, portions).prop_map(|(count, fits, admin, under, portions)| {
            let portions =
                fits.iter().filter(|device| **device < SHARED).map(|device| (*device, vec![(2, portions[*device])]));
            let portions = portions.collect();
            let (fits, constraints) = (fits.into_iter().collect(), under.into_iter().collect());
            Alternative { count, fits, portions, admin, constraints }
        })
    }

    fn claims() -> impl Strategy<Value = Claim> {
        let requests = prop::collection::vec(prop::collection::vec(alternatives(), 1..3), 1..3);
        let values = prop::collection::btree_map(0..DEVICES, 0..2_usize, 3..=DEVICES);
        let constraint = (any::<bool>(), values).prop_map(|(same, values)| Constraint { same, values });
        (requests, prop::collection::vec(constraint, 2))
            .prop_map(|(requests, constraints)| Claim { requests, constraints })
    }

    fn pool() -> impl Strategy<Value = Vec<Device>> {
        let draws = prop::collection::vec((0..2_usize, 1..3_i128), 0..2);
        let device =
            (prop::bool::weighted(0.2), draws).prop_map(|(taken, draws)| Device { taken, draws, shared: false });
        let share = |mut devices: Vec<Device>| {
            devices[..SHARED].iter_mut().for_each(|device| device.shared = true);
            devices
        };
        prop::collection::vec(device, DEVICES).prop_map(share)
    }

    proptest! {
        #[test]
        fn the_search_finds_what_trying_everything_finds(
            claims in prop::collection::vec(claims(), 1..3), devices in pool(), counters in prop::collection::vec(0..5_i128, 3),
        ) {
            let found = allocate(&claims, &devices, &counters).ok();
            let alternatives = |solution: &Solution| -> Vec<Vec<usize>> {
                solution.iter().map(|claim| claim.iter().map(|(number, _)| *number).collect()).collect()
            };
            // Of the first request the first alternative for which there is a solution; later ones depend on its devices.
            let first = |choice: Vec<Vec<usize>>| choice[0][0];
            let wanted = naive(&claims, &devices, &counters).map(first);
            prop_assert_eq!(found.as_ref().map(alternatives).map(first), wanted);
            if let Some(solution) = found {
                let requests: Vec<(usize, usize)> =
                    (0..claims.len()).flat_map(|c| (0..claims[c].requests.len()).map(move |r| (c, r))).collect();
                let flat: Vec<&(usize, Vec<usize>)> = solution.iter().flatten().collect();
                let picked: Vec<&Alternative> =
                    requests.iter().zip(&flat).map(|((c, r), (n, _))| &claims[*c].requests[*r][*n]).collect();
                let sets: Vec<Vec<usize>> = flat.iter().map(|(_, set)| set.clone()).collect();
                prop_assert!(is_right(&claims, &requests, &picked, &sets, &devices, &counters));
            }
        }
    }

    #[test]
    fn a_search_without_end_is_given_up() {
        let devices = vec![Device::default(); 60];
        let values = (0..60).map(|device| (device, device)).collect();
        let fits: Vec<usize> = (0..60).collect();
        let request =
            || vec![Alternative { count: Some(8), fits: fits.clone(), constraints: vec![0], ..Alternative::default() }];
        let claim = Claim {
            requests: vec![request(), vec![Alternative { count: Some(1), ..Alternative::default() }]],
            constraints: vec![Constraint { same: false, values }],
        };
        assert_eq!(allocate(&[claim], &devices, &[]), Err(Unsolved::TooHard));
    }
}
