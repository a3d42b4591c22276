use super::*;
use serde_json::{Value, json};

fn eval(source: &str, object: &Value) -> Result<Value, String> {
    let variables = [Variable { name: "object", schema: None }, Variable { name: "self", schema: None }];
    let program = Program::compile(source, &variables)?;
    let mut scope = Scope::new();
    scope.json("object", object, None).json("self", object, None);
    let value = program.eval(&scope, &Budget::of_expression()).map_err(|error| error.to_string())?;
    value.to_json().ok_or_else(|| value.type_name().to_owned())
}

fn holds(source: &str) {
    assert_eq!(
        eval(source, &json!({"a": [1, 2, 3], "m": {"x": 1, "y-z": "w"}, "s": "hello"})),
        Ok(json!(true)),
        "{source}"
    );
}

#[test]
fn the_language() {
    for source in [
        "1 + 2 * 3 == 7 && 7 / 2 == 3 && 7 % 2 == 1 && -1 < 0",
        "1 == 1.0 && 2u == 2 && 1.5 > 1",
        "object.a.all(x, x > 0) && object.a.exists(x, x == 2) && object.a.exists_one(x, x == 3)",
        "object.a.map(x, x * 2) == [2, 4, 6] && object.a.filter(x, x > 1).size() == 2",
        "object.m.all(k, k != 'q') && 'x' in object.m && 2 in object.a && !(9 in object.a)",
        "has(object.m.x) && !has(object.m.q) && object.m['y-z'] == 'w' && object.m.y__dash__z == 'w'",
        "true || object.nope.x && true",
        "object.nope.x == 1 || true",
        "object.?nope.?x.orValue(5) == 5 && object.?m.?x.orValue(5) == 1 && object[?'s'].hasValue()",
        "optional.of(1).optMap(v, v + 1).value() == 2 && !optional.none().hasValue()",
        "{'a': 1, 'b': 2}.transformList(k, v, v).size() == 2",
        "{'a': 1}.transformMap(k, v, v + 1) == {'a': 2} && [1, 2].all(i, v, v == i + 1)",
        "type(1) == int && type('') == string && int('3') == 3 && string(4) == '4' && double('1.5') == 1.5",
        "cel.bind(x, 2, x * x) == 4",
        "(object.a.size() > 2 ? 'big' : 'small') == 'big'",
        "dyn([1, 'a', true]).size() == 3",
    ] {
        holds(source);
    }
}

#[test]
fn the_libraries() {
    for source in [
        "'hello'.startsWith('he') && 'hello'.endsWith('lo') && 'hello'.contains('ll') && 'hello'.matches('^h.*o$')",
        "'abc123def'.find('[0-9]+') == '123' && 'a1b2'.findAll('[0-9]') == ['1', '2'] && 'a1b2'.findAll('[0-9]', 1) == ['1']",
        "'a,b,c'.split(',') == ['a', 'b', 'c'] && ['a', 'b'].join('-') == 'a-b' && 'abc'.substring(1, 2) == 'b'",
        "'abc'.indexOf('c') == 2 && 'abcabc'.lastIndexOf('a') == 3 && ' a '.trim() == 'a' && 'aXa'.lowerAscii() == 'axa'",
        "'abab'.replace('a', 'c', 1) == 'cbab' && '%s is %d'.format(['x', 3]) == 'x is 3' && 'abc'.reverse() == 'cba'",
        "[3, 1, 2].sort() == [1, 2, 3] && [1, 2].isSorted() && [1, 2, 3].sum() == 6 && [1, 5].max() == 5 && [1, 2, 1].lastIndexOf(1) == 2",
        "sets.contains([1, 2, 3], [2]) && sets.intersects([1], [1, 2]) && sets.equivalent([1, 2], [2, 1, 1])",
        "quantity('1Gi').isGreaterThan(quantity('500M')) && isQuantity('1k') && !isQuantity('x') && quantity('2').asInteger() == 2",
        "quantity('1').add(quantity('500m')).compareTo(quantity('1500m')) == 0",
        "url('https://a.b:80/p?x=1&x=2').getHost() == 'a.b:80' && url('https://a.b/p').getEscapedPath() == '/p' && isURL('/x') && !isURL('x')",
        "url('https://[::1]:80/').getHostname() == '::1' && url('/p?k=v').getQuery()['k'] == ['v']",
        "ip('10.0.0.1').family() == 4 && isIP('::1') && !isIP('1.2.3') && ip('127.0.0.1').isLoopback() && ip.isCanonical('::1')",
        "cidr('10.0.0.0/8').containsIP('10.1.2.3') && cidr('10.0.0.0/8').containsCIDR('10.1.0.0/16') && cidr('10.1.2.3/8').masked() == cidr('10.0.0.0/8')",
        "timestamp('2026-01-02T03:04:05Z') < timestamp('2026-01-03T03:04:05Z') && duration('1h') > duration('59m')",
        "timestamp('2026-01-02T03:04:05Z').getFullYear() == 2026 && timestamp('2026-01-02T00:00:00Z') + duration('24h') == timestamp('2026-01-03T00:00:00Z')",
        "semver('1.2.3').isLessThan(semver('1.10.0')) && isSemver('1.0.0-rc.1') && !isSemver('1.0') && semver('v1', true).major() == 1",
        "!format.dns1123Label().validate('ok').hasValue() && format.dns1123Label().validate('Not_ok').hasValue() && format.named('uuid').hasValue()",
        "math.greatest(1, 3, 2) == 3 && math.least([4, 2]) == 2 && math.abs(-1) == 1",
        "jsonpatch.escapeKey('a/b~c') == 'a~1b~0c' && base64.encode(b'hi') == 'aGk='",
        "[1, [2, 3]].flatten() == [1, 2, 3] && [1, 1, 2].distinct() == [1, 2] && [1, 2, 3].slice(0, 2) == [1, 2] && ['bb', 'a'].sortBy(s, s.size()) == ['a', 'bb']",
    ] {
        holds(source);
    }
}

#[test]
fn errors_and_bounds() {
    let error = |source: &str| eval(source, &json!({"a": [1]})).expect_err("fails");
    assert_eq!(error("object.b"), "no such key: b");
    assert_eq!(error("object.a[3]"), "index out of bounds: 3");
    assert_eq!(error("1 / 0 == 1"), "division by zero");
    assert_eq!(error("1 + 'a'"), "no such overload");
    assert!(
        error("nope == 1")
            .starts_with("ERROR: <input>:1:1: undeclared reference to 'nope' (in container '')\n | nope == 1\n | ^")
    );
    assert!(error("object.a.nope()").contains("undeclared reference to 'nope'"));
    assert!(error("1 +").contains("Syntax error"));
    let big = json!({"a": (0..3000).collect::<Vec<_>>()});
    let slow = eval("object.a.all(x, object.a.all(y, object.a.all(z, x + y + z >= 0)))", &big);
    assert_eq!(slow, Err("operation cancelled: actual cost limit exceeded".into()));
    assert_eq!(eval("object.a.map(x, x).size() == 3000", &big), Ok(json!(true)));
    let long = vec!["1"; 4000].join("+");
    assert!(eval(&long, &big).is_err());
    assert!(eval(&format!("{}1{}", "(".repeat(5000), ")".repeat(5000)), &big).is_err());
}

#[test]
fn mutations_make_objects() {
    let made = eval("Object{spec: Object.spec{replicas: 3, paused: object.p}}", &json!({"p": true}));
    assert_eq!(made, Ok(json!({"spec": {"replicas": 3, "paused": true}})));
    let patches = eval("[JSONPatch{op: 'add', path: '/x/' + jsonpatch.escapeKey('a/b'), value: 1}]", &json!({}));
    assert_eq!(patches, Ok(json!([{"op": "add", "path": "/x/a~1b", "value": 1}])));
}

struct OnlyPods;

impl Authorizer for OnlyPods {
    fn decide(&self, access: &Access) -> Verdict {
        Verdict { allowed: access.resource == "pods" && access.verb == "get", reason: "because".into(), error: None }
    }
}

#[test]
fn policies_have_variables_and_an_authorizer() {
    let names = ["object", "variables", "authorizer"].map(|name| Variable { name, schema: None });
    let compile = |source| Program::compile(source, &names).expect("compiles");
    let (first, second) = (compile("object.n + 1"), compile("variables.first * 2"));
    let main = compile(
        "variables.second == 4 && authorizer.group('').resource('pods').namespace('x').check('get').allowed() \
         && !authorizer.requestResource.check('get').allowed() && authorizer.path('/healthz').check('get').reason() == 'because'",
    );
    let object = json!({"n": 1});
    let mut scope = Scope::new();
    scope.json("object", &object, None).variable("first", &first).variable("second", &second);
    scope.authorizer(&OnlyPods, Access { resource: "nodes".into(), ..Access::default() });
    assert_eq!(main.eval_bool(&scope, &Budget::of_expression()), Ok(true));
}
