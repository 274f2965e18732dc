//! Patterns over tensor names: `*` is one dot-separated segment or a part of one, `**` any number of segments,
//! `{a,b}` alternatives. Compiled once; a name is rejected by its ends before anything else is tried.

use std::ops::Range;

use smallvec::SmallVec;

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
        let mut spelled = Vec::new();
        expand(text, &mut spelled)?;
        let forms = spelled.iter().map(|form| Form::new(form)).collect::<Result<_, _>>()?;
        Ok(Pattern { text: text.to_owned(), forms })
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

/// Fills a template: `{1}` is what the first wildcard matched, and so on. A dot after (or, at the end, before) a
/// `**` that matched no segment goes with it.
pub(super) fn fill(template: &str, name: &str, captures: &Captures) -> String {
    let mut filled = String::with_capacity(template.len() + name.len());
    let mut rest = template;
    while let Some((index, before, after)) = placeholder(rest) {
        filled.push_str(before);
        let matched = captures.get(index - 1).map_or("", |range| &name[range.clone()]);
        filled.push_str(matched);
        rest = after;
        if matched.is_empty() && (filled.is_empty() || filled.ends_with('.')) {
            match rest.strip_prefix('.') {
                Some(stripped) => rest = stripped,
                None if rest.is_empty() && filled.ends_with('.') => _ = filled.pop(),
                None => {}
            }
        }
    }
    filled.push_str(rest);
    filled
}

/// The largest index of a placeholder in a template, 0 if there is none.
pub(super) fn placeholders(template: &str) -> usize {
    let (mut rest, mut most) = (template, 0);
    while let Some((index, _, after)) = placeholder(rest) {
        most = most.max(index);
        rest = after;
    }
    most
}

/// The first `{digits}`: its number (1 or more), the text before and the text after it.
fn placeholder(template: &str) -> Option<(usize, &str, &str)> {
    let mut from = 0;
    while let Some(open) = template[from..].find('{').map(|at| at + from) {
        let close = open + template[open..].find('}')?;
        if let Ok(index @ 1..) = template[open + 1..close].parse::<usize>() {
            return Some((index, &template[..open], &template[close + 1..]));
        }
        from = open + 1;
    }
    None
}

/// Spells out the first group of alternatives, then the rest, recursively.
fn expand(text: &str, into: &mut Vec<String>) -> Result<(), String> {
    let Some(open) = text.find('{') else {
        if text.contains('}') {
            return Err(format!("`}}` without `{{` in pattern `{text}`"));
        }
        if into.len() == FORMS_MAX {
            return Err(format!("pattern with more than {FORMS_MAX} alternatives"));
        }
        into.push(text.to_owned());
        return Ok(());
    };
    let (mut depth, mut start, mut choices, mut close) = (0, open + 1, Vec::new(), None);
    for (at, byte) in text.bytes().enumerate().skip(open) {
        match byte {
            b'{' => depth += 1,
            b',' if depth == 1 => {
                choices.push(&text[start..at]);
                start = at + 1;
            }
            b'}' if depth == 1 => {
                choices.push(&text[start..at]);
                close = Some(at);
                break;
            }
            b'}' => depth -= 1,
            _ => {}
        }
    }
    let Some(close) = close else { return Err(format!("`{{` without `}}` in pattern `{text}`")) };
    for choice in choices {
        expand(&format!("{}{choice}{}", &text[..open], &text[close + 1..]), into)?;
    }
    Ok(())
}

impl Form {
    fn new(text: &str) -> Result<Form, String> {
        let mut tokens = tokens(text)?;
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

fn tokens(text: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let at_segment = match tokens.last() {
            None | Some(Token::Before) => true,
            Some(Token::Literal(before)) => before.ends_with('.'),
            _ => false,
        };
        if let Some(after) = rest.strip_prefix("**") {
            if !at_segment || !(after.is_empty() || after.starts_with('.')) {
                return Err(format!("`**` is not a whole segment in pattern `{text}`"));
            }
            match after.strip_prefix('.') {
                Some(after) => {
                    if tokens.last() != Some(&Token::Before) {
                        tokens.push(Token::Before);
                    }
                    rest = after;
                }
                None => {
                    let end = end_of(&mut tokens);
                    tokens.push(end);
                    rest = "";
                }
            }
        } else if let Some(after) = rest.strip_prefix('*') {
            tokens.push(Token::Part);
            rest = after;
        } else {
            let end = rest.find('*').unwrap_or(rest.len());
            tokens.push(Token::Literal(rest[..end].to_owned()));
            rest = &rest[end..];
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

/// Most spelled-out alternatives of one pattern.
const FORMS_MAX: usize = 256;

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
            fill(template, name, &captures)
        };
        assert_eq!(rename("model.layers.*.attn.*", "h.{1}.{2}", "model.layers.7.attn.wq"), "h.7.wq");
        assert_eq!(rename("**.q.weight", "{1}.wq", "a.b.q.weight"), "a.b.wq");
        assert_eq!(rename("**.q.weight", "{1}.wq", "q.weight"), "wq");
        assert_eq!(rename("model.**", "lm.{1}", "model"), "lm");
        assert_eq!(rename("*_x", "é{1}{1}", "ab_x"), "éabab");
        assert_eq!(placeholders("{2}.{1}.{x}"), 2);
    }
}
