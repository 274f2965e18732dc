//! Patterns over tensor names: `*` is one dot-separated segment or a part of one, `**` any number of segments,
//! `{a,b}` alternatives, and `\` takes the next character as it is. Compiled once; a name is rejected by its ends before
//! anything else is tried.

use std::ops::Range;

use smallvec::SmallVec;

use crate::limits::{PATTERN_DEPTH, PATTERN_FORMS};

/// A compiled pattern.
#[derive(Debug, Clone)]
pub(super) struct Pattern {
    text: String,
    /// The pattern once for each combination of its alternatives.
    forms: Vec<Form>,
}

/// What the wildcards matched, in order, as ranges of the name.
pub(super) type Captures = SmallVec<[Range<usize>; 4]>;

#[derive(Debug, Clone)]
struct Form {
    prefix: Box<str>,
    suffix: Box<str>,
    /// Between the literal prefix and the literal suffix; `None` if the prefix is all there is.
    middle: Option<Vec<Token>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Literal(String),
    /// `*`: anything without a dot.
    Part,
    /// `**` at the end of the pattern and alone: anything.
    All,
    /// `**.`: nothing, or whole segments with a dot after each.
    Before,
    /// `.**` at the end: nothing, or whole segments with a dot before each.
    After,
}

impl Pattern {
    /// Compiles a pattern; the error says what is wrong with it.
    pub(super) fn new(text: &str) -> Result<Pattern, String> {
        let wrong = |what: String| format!("{what} in pattern `{text}`");
        let symbols = symbols(text).map_err(wrong)?;
        let mut rest = &symbols[..];
        let spelled = expand(&mut rest, 0).map_err(wrong)?;
        let forms = spelled.iter().map(|form| Form::new(form)).collect::<Result<_, _>>().map_err(wrong)?;
        Ok(Pattern { text: text.to_owned(), forms })
    }

    /// A pattern like `name`, with `*` for each number; written such that it matches whatever else is in the name.
    pub(super) fn like(name: &str) -> String {
        let number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        let like: Vec<String> =
            name.split('.').map(|part| if number(part) { "*".to_owned() } else { escaped(part) }).collect();
        like.join(".")
    }

    /// A pattern that matches `name` and nothing else.
    pub(super) fn exactly(name: &str) -> String {
        escaped(name)
    }

    /// The pattern as it was written.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Whether the whole name matches.
    pub(super) fn matches(&self, name: &str) -> bool {
        self.forms.iter().any(|form| form.captures(name, &mut Captures::new()))
    }

    /// What the wildcards matched, or `None` if the name does not match.
    pub(super) fn captures(&self, name: &str) -> Option<Captures> {
        self.forms.iter().find_map(|form| {
            let mut captures = Captures::new();
            form.captures(name, &mut captures).then_some(captures)
        })
    }

    /// The most wildcards that are certain to be there, whichever alternative matches.
    pub(super) fn wildcards(&self) -> usize {
        let count = |form: &Form| {
            let tokens = form.middle.iter().flatten();
            tokens.filter(|token| !matches!(token, Token::Literal(_))).count()
        };
        self.forms.iter().map(count).min().unwrap_or(0)
    }
}

/// What destinations are renamed to: text, and in braces the number of a wildcard.
#[derive(Debug, Clone)]
pub(super) struct Template {
    text: String,
    parts: Vec<Part>,
}

#[derive(Debug, Clone)]
enum Part {
    Text(String),
    /// What this wildcard matched, the first being 0.
    Wildcard(usize),
}

impl Template {
    /// Compiles a template; the error says what is wrong with it.
    pub(super) fn new(text: &str) -> Result<Template, String> {
        let wrong = |what: String| format!("{what} in rename `{text}`");
        let symbols = symbols(text).map_err(wrong)?;
        let mut rest = &symbols[..];
        let mut parts = vec![Part::Text(String::new())];
        while let Some((symbol, after)) = rest.split_first() {
            rest = after;
            match symbol {
                Symbol::Open => {
                    let close = rest.iter().position(|symbol| *symbol == Symbol::Close);
                    let close = close.ok_or_else(|| wrong("`{` without `}`".into()))?;
                    let number: String = rest[..close].iter().map(Symbol::char).collect();
                    match number.parse::<usize>() {
                        Ok(wildcard @ 1..) => parts.push(Part::Wildcard(wildcard - 1)),
                        _ => return Err(wrong(format!("`{{{number}}}`, which is no number of a wildcard from 1,"))),
                    }
                    rest = &rest[close + 1..];
                }
                Symbol::Close => return Err(wrong("`}` without `{`".into())),
                plain => match parts.last_mut() {
                    Some(Part::Text(text)) => text.push(plain.char()),
                    _ => parts.push(Part::Text(plain.char().into())),
                },
            }
        }
        Ok(Template { text: text.to_owned(), parts })
    }

    /// The template as it was written.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// The largest number of a wildcard, counted from 1; 0 if there is none.
    pub(super) fn wildcards(&self) -> usize {
        let number = |part: &Part| if let Part::Wildcard(number) = part { number + 1 } else { 0 };
        self.parts.iter().map(number).max().unwrap_or(0)
    }

    /// The name that a tensor gets. A dot after (or, at the end, before) a `**` that matched no segment goes with it.
    pub(super) fn fill(&self, name: &str, captures: &Captures) -> String {
        let mut filled = String::with_capacity(self.text.len() + name.len());
        let mut dotless = false;
        for part in &self.parts {
            match part {
                Part::Text(text) => filled.push_str(text.strip_prefix('.').filter(|_| dotless).unwrap_or(text)),
                Part::Wildcard(number) => {
                    filled.push_str(captures.get(*number).map_or("", |range| &name[range.clone()]));
                }
            }
            let nothing = |number: usize| captures.get(number).is_none_or(Range::is_empty);
            dotless = matches!(part, Part::Wildcard(number) if nothing(*number))
                && (filled.is_empty() || filled.ends_with('.'));
        }
        if dotless && filled.ends_with('.') {
            filled.pop();
        }
        filled
    }
}

/// A character of a pattern or a template, its escapes resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Symbol {
    Char(char),
    Star,
    Open,
    Comma,
    Close,
}

impl Symbol {
    fn char(&self) -> char {
        match *self {
            Symbol::Char(char) => char,
            Symbol::Star => '*',
            Symbol::Open => '{',
            Symbol::Comma => ',',
            Symbol::Close => '}',
        }
    }
}

fn symbols(text: &str) -> Result<Vec<Symbol>, String> {
    let mut symbols = Vec::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(char) = chars.next() {
        symbols.push(match char {
            '\\' => Symbol::Char(chars.next().ok_or("`\\` before nothing")?),
            '*' => Symbol::Star,
            '{' => Symbol::Open,
            ',' => Symbol::Comma,
            '}' => Symbol::Close,
            char => Symbol::Char(char),
        });
    }
    Ok(symbols)
}

/// `text` such that a pattern matches it and nothing else.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in text.chars() {
        if matches!(char, '\\' | '*' | '{' | ',' | '}') {
            escaped.push('\\');
        }
        escaped.push(char);
    }
    escaped
}

/// Spells out all alternatives, up to the end or (inside of braces) up to the `,` or `}` that ends a choice.
fn expand(rest: &mut &[Symbol], depth: usize) -> Result<Vec<Vec<Symbol>>, String> {
    let mut forms = vec![Vec::new()];
    while let Some((symbol, after)) = rest.split_first() {
        match symbol {
            Symbol::Comma | Symbol::Close if depth > 0 => break,
            Symbol::Close => return Err("`}` without `{`".into()),
            Symbol::Open => {
                *rest = after;
                let choices = choices(rest, depth + 1)?;
                if forms.len() * choices.len() > PATTERN_FORMS {
                    return Err(format!("more than {PATTERN_FORMS} alternatives"));
                }
                let joined = |form: &Vec<Symbol>| {
                    let form = form.clone();
                    choices.iter().map(move |choice| [&form[..], choice].concat()).collect::<Vec<_>>()
                };
                forms = forms.iter().flat_map(joined).collect();
            }
            plain => {
                *rest = after;
                forms.iter_mut().for_each(|form| form.push(*plain));
            }
        }
    }
    Ok(forms)
}

/// The choices of a group, whose `{` was taken; takes its `}`.
fn choices(rest: &mut &[Symbol], depth: usize) -> Result<Vec<Vec<Symbol>>, String> {
    if depth > PATTERN_DEPTH {
        return Err(format!("alternatives nested deeper than {PATTERN_DEPTH}"));
    }
    let mut choices = Vec::new();
    loop {
        choices.extend(expand(rest, depth)?);
        if choices.len() > PATTERN_FORMS {
            return Err(format!("more than {PATTERN_FORMS} alternatives"));
        }
        let Some((symbol, after)) = rest.split_first() else { return Err("`{` without `}`".into()) };
        *rest = after;
        if *symbol == Symbol::Close {
            return Ok(choices);
        }
    }
}

impl Form {
    fn new(symbols: &[Symbol]) -> Result<Form, String> {
        let mut tokens = tokens(symbols)?;
        let prefix = match tokens.first() {
            Some(Token::Literal(_)) => literal(tokens.remove(0)),
            _ => Box::default(),
        };
        if tokens.is_empty() {
            return Ok(Form { prefix, suffix: Box::default(), middle: None });
        }
        let suffix = match tokens.last() {
            Some(Token::Literal(_)) => tokens.pop().map(literal).unwrap_or_default(),
            _ => Box::default(),
        };
        Ok(Form { prefix, suffix, middle: Some(tokens) })
    }

    fn captures(&self, name: &str, captures: &mut Captures) -> bool {
        let Some(middle) = &self.middle else { return *self.prefix == *name };
        if name.len() < self.prefix.len() + self.suffix.len()
            || !name.as_bytes().ends_with(self.suffix.as_bytes())
            || !name.as_bytes().starts_with(self.prefix.as_bytes())
        {
            return false;
        }
        walk(middle, name, self.prefix.len(), name.len() - self.suffix.len(), captures)
    }
}

fn literal(token: Token) -> Box<str> {
    match token {
        Token::Literal(text) => text.into_boxed_str(),
        _ => Box::default(),
    }
}

fn tokens(symbols: &[Symbol]) -> Result<Vec<Token>, String> {
    let dot = Symbol::Char('.');
    let mut tokens = Vec::new();
    let mut rest = symbols;
    while let Some((symbol, after)) = rest.split_first() {
        let at_segment = match tokens.last() {
            None | Some(Token::Before) => true,
            Some(Token::Literal(before)) => before.ends_with('.'),
            _ => false,
        };
        if let Some(after) = rest.strip_prefix(&[Symbol::Star, Symbol::Star]) {
            if !at_segment || after.first().is_some_and(|next| *next != dot) {
                return Err("`**` that is not a whole segment".into());
            }
            match after.split_first() {
                Some((_, after)) => {
                    if tokens.last() != Some(&Token::Before) {
                        tokens.push(Token::Before);
                    }
                    rest = after;
                }
                None => {
                    let end = end_of(&mut tokens);
                    tokens.push(end);
                    rest = &[];
                }
            }
        } else {
            rest = after;
            match (symbol, tokens.last_mut()) {
                (Symbol::Star, _) => tokens.push(Token::Part),
                (plain, Some(Token::Literal(text))) => text.push(plain.char()),
                (plain, _) => tokens.push(Token::Literal(plain.char().into())),
            }
        }
    }
    Ok(tokens)
}

/// The token of a final `**`: it takes the dot before it along, so that `a.**` also matches `a`.
fn end_of(tokens: &mut Vec<Token>) -> Token {
    match tokens.last_mut() {
        Some(Token::Literal(before)) => {
            before.pop();
            if before.is_empty() {
                tokens.pop();
            }
            Token::After
        }
        _ => Token::All,
    }
}

fn walk(tokens: &[Token], name: &str, at: usize, end: usize, captures: &mut Captures) -> bool {
    let Some((token, rest)) = tokens.split_first() else { return at == end };
    let bytes = name.as_bytes();
    let held = captures.len();
    let mut attempt = |captured: Range<usize>, next: usize| {
        captures.push(captured);
        let found = walk(rest, name, next, end, captures);
        if !found {
            captures.truncate(held);
        }
        found
    };
    match token {
        Token::Literal(text) => {
            bytes[at..end].starts_with(text.as_bytes()) && walk(rest, name, at + text.len(), end, captures)
        }
        Token::Part => {
            let limit = bytes[at..end].iter().position(|&byte| byte == b'.').map_or(end, |dot| at + dot);
            (at..=limit).filter(|&stop| name.is_char_boundary(stop)).any(|stop| attempt(at..stop, stop))
        }
        Token::All => attempt(at..end, end),
        Token::Before if rest.is_empty() => {
            // Whole segments up to the literal suffix, the last dot included.
            (at == end || bytes[end - 1] == b'.') && attempt(at..end.saturating_sub(1).max(at), end)
        }
        Token::Before => {
            attempt(at..at, at) || (at..end).filter(|&dot| bytes[dot] == b'.').any(|dot| attempt(at..dot, dot + 1))
        }
        Token::After => match bytes[at..end].first() {
            None => attempt(at..at, at),
            Some(b'.') => attempt(at + 1..end, end),
            Some(_) => false,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        Pattern::new(pattern).unwrap().matches(name)
    }

    #[test]
    fn a_star_stays_in_its_segment() {
        assert!(matches("model.layers.*.q_proj.weight", "model.layers.17.q_proj.weight"));
        assert!(!matches("model.*.q_proj.weight", "model.layers.17.q_proj.weight"));
        assert!(matches("*.w*t", "a.weight"));
        assert!(!matches("*", "a.b"));
        assert!(matches("a", "a") && !matches("a", "ab") && !matches("a", "b.a"));
    }

    #[test]
    fn two_stars_are_any_number_of_segments() {
        for name in ["q_proj.weight", "model.q_proj.weight", "model.layers.0.q_proj.weight"] {
            assert!(matches("**.q_proj.weight", name), "{name}");
        }
        assert!(!matches("**.q_proj.weight", "model.xq_proj.weight"));
        assert!(matches("a.**.b", "a.b") && matches("a.**.b", "a.x.y.b") && !matches("a.**.b", "a.xb"));
        assert!(matches("a.**", "a") && matches("a.**", "a.b.c") && !matches("a.**", "ab"));
        assert!(matches("**", "") && matches("**", "a.b"));
        assert!(matches("**.x.**", "x") && matches("**.x.**", "a.x.b") && !matches("**.x.**", "a.xb"));
        assert!(Pattern::new("a**").is_err() && Pattern::new("**a").is_err());
    }

    #[test]
    fn alternatives_nest() {
        for name in ["l.q_proj.weight", "l.v_proj.bias"] {
            assert!(matches("**.{q,k,v}_proj.{weight,bias}", name), "{name}");
        }
        assert!(matches("{transformer.,}h.*.w", "h.3.w") && matches("{transformer.,}h.*.w", "transformer.h.3.w"));
        assert!(matches("a.{b{1,2},c}", "a.b2") && !matches("a.{b{1,2},c}", "a.b"));
        assert!(Pattern::new("{a").is_err() && Pattern::new("a}").is_err());
    }

    #[test]
    fn templates_take_what_was_matched() {
        let rename = |pattern: &str, template: &str, name: &str| {
            let captures = Pattern::new(pattern).unwrap().captures(name).expect("matches");
            Template::new(template).unwrap().fill(name, &captures)
        };
        assert_eq!(rename("model.layers.*.attn.*", "h.{1}.{2}", "model.layers.7.attn.wq"), "h.7.wq");
        assert_eq!(rename("**.q.weight", "{1}.wq", "a.b.q.weight"), "a.b.wq");
        assert_eq!(rename("**.q.weight", "{1}.wq", "q.weight"), "wq");
        assert_eq!(rename("model.**", "lm.{1}", "model"), "lm");
        assert_eq!(rename("*_x", "é{1}{1}", "ab_x"), "éabab");
        assert_eq!(rename("**.a.**", "{1}.{2}", "a"), "");
        assert_eq!(rename("*", "\\{1\\}{1},*", "a"), "{1}a,*");
        assert_eq!(Template::new("{2}.{1}").unwrap().wildcards(), 2);
        for wrong in ["{0}", "{x}", "{}", "{-1}", "{1", "1}", "{1}\\", "{{1}}"] {
            assert!(Template::new(wrong).unwrap_err().contains(wrong), "{wrong}");
        }
    }

    #[test]
    fn a_backslash_takes_the_next_character_as_it_is() {
        assert!(matches(r"a\*.w", "a*.w") && !matches(r"a\*.w", "ab.w"));
        assert!(matches(r"\*\*", "**") && matches(r"a\{b\,c\}", "a{b,c}") && matches(r"{a\,b,c}", "a,b"));
        assert!(matches(r"\\", "\\") && matches(r"\a", "a") && Pattern::new("a\\").is_err());
        assert!(matches("a,b", "a,b"), "a comma outside of braces is none of theirs");
        for name in ["", "a.0.b", "{", "}", "{a,b}", "a*", "**", r"\", "a\"b", "0", "x.**.y", "é.\n.{0}"] {
            assert!(matches(&Pattern::like(name), name), "{name:?}");
        }
        assert_eq!(Pattern::like("l.17.{x}*.w"), r"l.*.\{x\}\*.w");
    }

    #[test]
    fn alternatives_are_bounded() {
        assert_eq!(Pattern::new(&"{a,b}".repeat(8)).unwrap().forms.len(), 256);
        assert!(Pattern::new(&"{a,b}".repeat(9)).unwrap_err().contains("256"));
        assert!(Pattern::new(&"{".repeat(100_000)).unwrap_err().contains("nested"));
        assert!(matches(&"{a}".repeat(10_000), &"a".repeat(10_000)));
    }
}
