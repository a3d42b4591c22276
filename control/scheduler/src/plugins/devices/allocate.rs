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
    /// Somebody has it.
    pub(super) taken: bool,
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
    taken: Vec<bool>,
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
        taken: devices.iter().map(|device| device.taken).collect(),
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
            if alternative.fits.len() - at < left {
                return Ok(false);
            }
            self.steps += 1;
            if self.steps > MAX_STEPS {
                return Err(TooHard);
            }
            let device = alternative.fits[at];
            if self.may_have(claim, alternative, device) {
                self.take(claim, alternative, device);
                if self.device(claim, alternative, at + 1, left - 1)? {
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
        let room = || self.devices[device].draws.iter().all(|(counter, amount)| self.counters[*counter] >= *amount);
        if !alternative.admin && (self.taken[device] || !room()) {
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
            self.taken[device] = true;
            for (counter, amount) in &self.devices[device].draws {
                self.counters[*counter] -= amount;
            }
        }
    }

    fn give_back(&mut self, claim: usize, alternative: &Alternative, device: usize) {
        if let Some((_, devices)) = self.solution[claim].last_mut() {
            devices.pop();
        }
        if !alternative.admin {
            self.taken[device] = false;
            for (counter, amount) in &self.devices[device].draws {
                self.counters[*counter] += amount;
            }
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
        let fits = &alternative.fits;
        (0..1_usize << fits.len()).any(|bits| {
            let set: Vec<usize> = (0..fits.len()).filter(|i| bits & (1 << i) != 0).map(|i| fits[i]).collect();
            if set.is_empty() || set.len() != alternative.count.unwrap_or(fits.len()) {
                return false;
            }
            sets.push(set);
            let found = possible(claims, requests, picked, sets, devices, counters);
            sets.pop();
            found
        })
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
        let once = owned.iter().all(|d| !devices[*d].taken && owned.iter().filter(|o| o == &d).count() == 1);
        let drawn = |counter: usize| -> i128 {
            let draws = owned.iter().flat_map(|d| &devices[*d].draws);
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

    fn alternatives() -> impl Strategy<Value = Alternative> {
        let count = prop_oneof![Just(None), (1..3_usize).prop_map(Some)];
        let fits = prop::collection::btree_set(0..DEVICES, 0..=DEVICES);
        let under = prop::collection::btree_set(0..2_usize, 0..=2);
        (count, fits, prop::bool::weighted(0.2), under).prop_map(|(count, fits, admin, under)| Alternative {
            count,
            fits: fits.into_iter().collect(),
            admin,
            constraints: under.into_iter().collect(),
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
        let device = (prop::bool::weighted(0.2), draws).prop_map(|(taken, draws)| Device { taken, draws });
        prop::collection::vec(device, DEVICES)
    }

    proptest! {
        #[test]
        fn the_search_finds_what_trying_everything_finds(
            claims in prop::collection::vec(claims(), 1..3), devices in pool(), counters in prop::collection::vec(0..5_i128, 2),
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
        let request = || vec![Alternative { count: Some(8), fits: fits.clone(), admin: false, constraints: vec![0] }];
        let claim = Claim {
            requests: vec![request(), vec![Alternative { count: Some(1), ..Alternative::default() }]],
            constraints: vec![Constraint { same: false, values }],
        };
        assert_eq!(allocate(&[claim], &devices, &[]), Err(Unsolved::TooHard));
    }
}
