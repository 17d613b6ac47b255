package api

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/go-bexpr"
)

// maxFilter bounds a filter expression, in bytes; the parser recurses.
const (
	maxFilter      = 8 << 10
	maxFilterSteps = 100_000 // of parsing it
)

// filtered makes a test from the request's filter expression; nil when there is none.
func (r *request) filtered() (func(datum any) (bool, error), error) {
	if r.filter == "" {
		return nil, nil
	}
	const text = "failed to create result paginator: failed to read filter expression: "
	if len(r.filter) > maxFilter {
		return nil, badRequest(text+"it has %d bytes; at most %d are allowed", len(r.filter), maxFilter)
	}
	eval, err := bexpr.CreateEvaluator(r.filter, bexpr.WithMaxExpressions(maxFilterSteps))
	if err != nil {
		return nil, badRequest(text+"%v", err)
	}
	return func(datum any) (bool, error) {
		ok, err := eval.Evaluate(datum)
		if err != nil {
			return false, badRequest("failed to read result page: %v", err)
		}
		return ok, nil
	}, nil
}

// position orders the items of a list; its String is the token of a page that
// begins there. Of a list, either all have a number or none has.
type position struct {
	number uint64
	text   string
	plain  bool // no number
}

func (p position) String() string {
	if p.plain {
		return p.text
	}
	return strconv.FormatUint(p.number, 10) + "." + p.text
}

func (p position) compare(o position) int {
	return cmp.Or(cmp.Compare(p.number, o.number), cmp.Compare(p.text, o.text))
}

func created(index uint64, id string) position { return position{number: index, text: id} }

func named(parts ...string) position { return position{text: strings.Join(parts, "."), plain: true} }

// token reads the request's next_token in the form of the list's positions.
func (r *request) token(plain bool) (position, error) {
	if plain {
		return position{text: r.nextToken, plain: true}, nil
	}
	number, text, _ := strings.Cut(r.nextToken, ".")
	n, err := strconv.ParseUint(number, 10, 64)
	if err != nil {
		return position{}, badRequest("invalid next_token %q: use the one that the page before gave", r.nextToken)
	}
	return position{number: n, text: text}, nil
}

// page gives the page of a list that the request asks for: filtered by datum,
// sorted by at, and shown as show makes it. plain tells the form of the positions.
func page[T any](r *request, index uint64, items []T, plain bool, at func(T) position, datum func(T) any, show func(T) any) found {
	fail := func(err error) found { return found{index: index, err: err} }
	keep, err := r.filtered()
	if err != nil {
		return fail(err)
	}
	order := func(a, b T) int { return at(a).compare(at(b)) }
	if r.reverse {
		order = func(a, b T) int { return at(b).compare(at(a)) }
	}
	items = slices.Clone(items)
	slices.SortFunc(items, order)
	if r.nextToken != "" {
		token, err := r.token(plain)
		if err != nil {
			return fail(err)
		}
		first := slices.IndexFunc(items, func(item T) bool {
			c := at(item).compare(token)
			return c == 0 || c > 0 != r.reverse
		})
		if first < 0 {
			first = len(items)
		}
		items = items[first:]
	}
	out := []any{}
	for _, item := range items {
		if keep != nil {
			ok, err := keep(datum(item))
			if err != nil {
				return fail(err)
			}
			if !ok {
				continue
			}
		}
		if r.perPage > 0 && len(out) == r.perPage {
			return found{body: out, index: index, next: at(item).String()}
		}
		out = append(out, show(item))
	}
	return found{body: out, index: index}
}

// inNamespace keeps what belongs to the request's namespace; "*" keeps all.
func inNamespace[T any](r *request, items []*T, of func(*T) string) []*T {
	if r.namespace == "*" {
		return items
	}
	var out []*T
	for _, item := range items {
		if of(item) == r.namespace {
			out = append(out, item)
		}
	}
	return out
}

// idPrefix reads the request's prefix of IDs of a kind.
func (r *request) idPrefix(what string) (string, error) {
	if r.prefix == "" {
		return "", nil
	}
	return uuidPrefix(r.prefix, what)
}
