//! Who else is on this machine, and turns taken with them.

use std::path::PathBuf;

use crate::report::Samples;

/// Where debian keeps programs of root that a user's PATH may lack.
const SYSTEM_FOLDERS: [&str; 2] = ["/usr/sbin", "/sbin"];

/// The program of that name, if the machine has it.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<_> = std::env::split_paths(&path).chain(SYSTEM_FOLDERS.map(PathBuf::from)).collect();
    folders.into_iter().map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// The program of that name beside this one.
pub(crate) fn beside(program: &str) -> anyhow::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(program))
}

/// One who takes part: a name, and how a sample is taken or why it could not be.
pub(crate) struct Contestant<'a> {
    pub(crate) name: String,
    pub(crate) sample: Box<dyn FnMut() -> Result<f64, String> + 'a>,
}

/// Takes `runs` samples of each, A B A B …, after one round that is not counted. Who fails once is out.
pub(crate) fn interleave(mut contestants: Vec<Contestant<'_>>, runs: usize) -> Vec<Samples> {
    let mut measured: Vec<Samples> = contestants.iter().map(|who| (who.name.clone(), Ok(Vec::new()))).collect();
    for round in 0..=runs {
        for (who, (_, samples)) in contestants.iter_mut().zip(&mut measured) {
            let Ok(taken) = samples else { continue };
            match (who.sample)() {
                Ok(_) if round == 0 => {}
                Ok(sample) => taken.push(sample),
                Err(failure) => *samples = Err(failure),
            }
        }
    }
    measured
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn turns_alternate_and_a_failure_is_no_time() {
        let order = RefCell::new(String::new());
        let who = |name: &'static str, fails: bool| {
            let order = &order;
            let sample = move || {
                order.borrow_mut().push_str(name);
                if fails { Err("no".to_owned()) } else { Ok(1.0) }
            };
            Contestant { name: name.into(), sample: Box::new(sample) }
        };
        let measured = interleave(vec![who("a", false), who("b", true), who("c", false)], 2);
        assert_eq!(*order.borrow(), "abcacac");
        assert_eq!(measured[0].1, Ok(vec![1.0, 1.0]));
        assert_eq!(measured[1].1, Err("no".to_owned()));
    }
}
