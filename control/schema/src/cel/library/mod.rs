//! The functions: CEL's own and the libraries that Kubernetes adds.

mod convert;
mod lists;
mod net;
pub(super) use net::parse_semver;
mod numbers;
mod text;
mod time;

use cel::common::ast::operators as op;

use super::Budget;
use super::value::{CelError, Val};

pub(super) type Outcome<'a> = Result<Val<'a>, CelError>;

/// Prefixes of functions such as `sets.contains`.
const NAMESPACES: [&str; 11] =
    ["math", "sets", "ip", "cidr", "optional", "format", "cel", "base64", "strings", "jsonpatch", "lists"];

/// All functions, sorted; the evaluator finds them in the library modules.
const FUNCTIONS: &[&str] = &[
    "!_",
    "-_",
    "@in",
    "@not_strictly_false",
    "_!=_",
    "_%_",
    "_&&_",
    "_*_",
    "_+_",
    "_-_",
    "_/_",
    "_<=_",
    "_<_",
    "_==_",
    "_>=_",
    "_>_",
    "_?._",
    "_?_:_",
    "_[?_]",
    "_[_]",
    "_||_",
    "add",
    "all",
    "allowed",
    "asApproximateFloat",
    "asInteger",
    "base64.decode",
    "base64.encode",
    "bool",
    "bytes",
    "cel.bind",
    "charAt",
    "check",
    "cidr",
    "compareTo",
    "contains",
    "containsCIDR",
    "containsIP",
    "distinct",
    "double",
    "duration",
    "dyn",
    "endsWith",
    "error",
    "errored",
    "exists",
    "existsOne",
    "exists_one",
    "family",
    "fieldSelector",
    "find",
    "findAll",
    "first",
    "flatten",
    "format",
    "format.dns1035Label",
    "format.dns1035LabelPrefix",
    "format.dns1123Label",
    "format.dns1123LabelPrefix",
    "format.dns1123Subdomain",
    "format.dns1123SubdomainPrefix",
    "format.labelValue",
    "format.named",
    "format.qualifiedName",
    "format.uri",
    "format.uuid",
    "format.byte",
    "format.date",
    "format.datetime",
    "getDate",
    "getDayOfMonth",
    "getDayOfWeek",
    "getDayOfYear",
    "getEscapedPath",
    "getFullYear",
    "getHost",
    "getHostname",
    "getHours",
    "getMilliseconds",
    "getMinutes",
    "getMonth",
    "getPort",
    "getQuery",
    "getScheme",
    "getSeconds",
    "group",
    "hasValue",
    "indexOf",
    "int",
    "ip",
    "ip.isCanonical",
    "isCIDR",
    "isGlobalUnicast",
    "isGreaterThan",
    "isIP",
    "isInteger",
    "isLessThan",
    "isLinkLocalMulticast",
    "isLinkLocalUnicast",
    "isLoopback",
    "isQuantity",
    "isSemver",
    "isSorted",
    "isURL",
    "isUnspecified",
    "join",
    "jsonpatch.escapeKey",
    "labelSelector",
    "last",
    "lastIndexOf",
    "lists.range",
    "lowerAscii",
    "major",
    "masked",
    "matches",
    "math.abs",
    "math.bitAnd",
    "math.bitNot",
    "math.bitOr",
    "math.bitShiftLeft",
    "math.bitShiftRight",
    "math.bitXor",
    "math.ceil",
    "math.floor",
    "math.greatest",
    "math.isFinite",
    "math.isInf",
    "math.isNaN",
    "math.least",
    "math.round",
    "math.sign",
    "math.sqrt",
    "math.trunc",
    "max",
    "min",
    "minor",
    "name",
    "namespace",
    "optFlatMap",
    "optMap",
    "optional.none",
    "optional.of",
    "optional.ofNonZeroValue",
    "or",
    "orValue",
    "patch",
    "path",
    "prefixLength",
    "quantity",
    "quote",
    "reason",
    "replace",
    "resource",
    "reverse",
    "semver",
    "serviceAccount",
    "sets.contains",
    "sets.equivalent",
    "sets.intersects",
    "sign",
    "size",
    "slice",
    "sort",
    "sortBy",
    "split",
    "startsWith",
    "string",
    "strings.quote",
    "sub",
    "subresource",
    "substring",
    "sum",
    "timestamp",
    "transformList",
    "transformMap",
    "transformMapEntry",
    "trim",
    "type",
    "uint",
    "upperAscii",
    "url",
    "validate",
    "value",
];

pub(super) fn is_namespace(name: &str) -> bool {
    NAMESPACES.contains(&name)
}

pub(super) fn is_known(name: &str) -> bool {
    FUNCTIONS.contains(&name)
}

/// How many of a macro's first arguments are names it binds.
pub(super) fn bound_names(name: &str, args: usize) -> usize {
    match (name, args) {
        ("all" | "exists" | "existsOne" | "exists_one", 3) => 2,
        ("transformList" | "transformMap" | "transformMapEntry", 3 | 4) => 2,
        ("existsOne" | "optMap" | "optFlatMap" | "sortBy", 2) | ("cel.bind", 3) => 1,
        _ => 0,
    }
}

/// Estimated cost of a call beyond its arguments.
pub(super) fn extra_cost(name: &str) -> u64 {
    match name {
        "matches" | "find" | "findAll" | "replace" | "split" | "join" | "format" => 50,
        "check" => 350_000,
        _ => 0,
    }
}

/// The types that can be named in expressions.
pub(super) fn type_named<'a>(name: &str) -> Option<Val<'a>> {
    const TYPES: [&str; 11] =
        ["bool", "bytes", "double", "int", "list", "map", "null_type", "string", "type", "uint", "optional_type"];
    TYPES.iter().find(|own| **own == name).map(|own| Val::Type((*own).into()))
}

pub(super) fn no_overload<'a>() -> Outcome<'a> {
    Err(CelError::message("no such overload"))
}

pub(super) fn fail<'a>(text: impl Into<String>) -> Outcome<'a> {
    Err(CelError::message(text))
}

/// Calls `name`; for a member call the target is the first of `args`.
pub(super) fn call<'a>(name: &str, member: bool, args: &[Val<'a>], budget: &Budget) -> Outcome<'a> {
    // Work grows with what is looked at.
    let size: usize = args.iter().map(|arg| arg.size().unwrap_or(0)).sum();
    budget.spend(1 + size as u64 / 10)?;
    match (name, args) {
        (op::EQUALS, [a, b]) => return Ok(Val::Bool(a.equals(b))),
        (op::NOT_EQUALS, [a, b]) => return Ok(Val::Bool(!a.equals(b))),
        (op::LESS | op::LESS_EQUALS | op::GREATER | op::GREATER_EQUALS, [a, b]) => {
            let Some(order) = a.compare(b) else {
                let numbers = matches!(a, Val::Double(_)) || matches!(b, Val::Double(_));
                return if numbers { Ok(Val::Bool(false)) } else { no_overload() };
            };
            return Ok(Val::Bool(match name {
                op::LESS => order.is_lt(),
                op::LESS_EQUALS => order.is_le(),
                op::GREATER => order.is_gt(),
                _ => order.is_ge(),
            }));
        }
        (op::LOGICAL_NOT, [Val::Bool(flag)]) => return Ok(Val::Bool(!flag)),
        (op::INDEX, [list, key]) => return index(list, key),
        (op::OPT_INDEX, [list, key]) => {
            let inner = match list {
                Val::Optional(None) => return Ok(list.clone()),
                Val::Optional(Some(inner)) => inner.as_ref().clone(),
                other => other.clone(),
            };
            return Ok(index(&inner, key).map_or(Val::Optional(None), Val::some));
        }
        (op::IN, [item, list]) => {
            if let Some(items) = list.items() {
                budget.spend(items.len() as u64)?;
                return Ok(Val::Bool(items.iter().any(|own| own.equals(item))));
            }
            return match list {
                Val::Map(_) | Val::Object(..) => Ok(Val::Bool(list.get(item).is_some())),
                _ => no_overload(),
            };
        }
        ("size", [value]) => return value.size().map_or_else(no_overload, |size| Ok(Val::Int(int(size)))),
        ("type", [value]) => return Ok(Val::Type(value.type_name().to_owned().into())),
        ("dyn", [value]) => return Ok(value.clone()),
        _ => {}
    }
    if let Some(Val::Authorizer(query)) = args.first().filter(|_| member) {
        return query.call(name, &args[1..]).unwrap_or_else(no_overload);
    }
    if let Some(Val::Verdict(verdict)) = args.first().filter(|_| member) {
        return verdict.call(name).map_or_else(no_overload, Ok);
    }
    let libraries = [numbers::call, convert::call, text::call, lists::call, net::call, time::call];
    libraries.iter().find_map(|library| library(name, args)).unwrap_or_else(no_overload)
}

pub(super) fn int(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

fn index<'a>(list: &Val<'a>, key: &Val<'a>) -> Outcome<'a> {
    if matches!(list, Val::Map(_) | Val::Object(..)) {
        let shown = key.to_json().map(|key| key.as_str().map_or_else(|| key.to_string(), str::to_owned));
        return list.get(key).ok_or_else(|| CelError::message(format!("no such key: {}", shown.unwrap_or_default())));
    }
    let at = match key {
        Val::Int(at) => *at,
        Val::Uint(at) => i64::try_from(*at).unwrap_or(i64::MAX),
        Val::Double(at) if at.fract() == 0.0 => *at as i64,
        _ => return no_overload(),
    };
    if list.size().is_none() || matches!(list, Val::Text(_) | Val::Bytes(_)) {
        return no_overload();
    }
    let item = usize::try_from(at).ok().and_then(|at| list.item(at));
    item.ok_or_else(|| CelError::message(format!("index out of bounds: {at}")))
}
