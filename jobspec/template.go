package jobspec

import (
	"slices"
	"strings"
	"text/template/parse"

	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
)

// templateFuncs are the functions that a template may call: those that agents
// offer, and Go's own.
var templateFuncs = []string{"env", "envOrDefault", "mustEnv", "toLower", "toUpper", "trimSpace"}

var builtinFuncs = []string{
	"and", "eq", "ge", "gt", "html", "index", "js", "le", "len", "lt", "ne", "not", "or", "print", "printf", "println",
	"slice", "urlquery", "call",
}

func (c *checker) template(in *api.Template, at string) *cluster.Template {
	t := &cluster.Template{
		SourcePath:   or(in.SourcePath, ""),
		DestPath:     or(in.DestPath, ""),
		EmbeddedTmpl: or(in.EmbeddedTmpl, ""),
		ChangeMode:   or(in.ChangeMode, "restart"),
		ChangeSignal: c.signal(or(in.ChangeSignal, ""), join(at, "change_signal")),
		Perms:        or(in.Perms, "0644"),
		LeftDelim:    or(in.LeftDelim, "{{"),
		RightDelim:   or(in.RightDelim, "}}"),
		Envvars:      or(in.Envvars, false),
	}
	switch {
	case t.SourcePath == "" && in.EmbeddedTmpl == nil:
		c.fault(at, "has neither data nor source")
	case t.SourcePath != "" && t.EmbeddedTmpl != "":
		c.fault(at, "has both data and source")
	}
	if t.DestPath == "" {
		c.fault(join(at, "destination"), "is missing")
	} else {
		c.inside(t.DestPath, join(at, "destination"))
	}
	switch t.ChangeMode {
	case "noop", "restart":
	case "signal":
		if t.ChangeSignal == "" {
			t.ChangeSignal = "SIGHUP"
		}
	case "script":
		c.fault(join(at, "change_mode"), `"script" %s; known: noop, restart, signal`, notYet)
	default:
		c.oneOf(t.ChangeMode, join(at, "change_mode"), "noop", "restart", "signal")
	}
	if !fileMode.MatchString(t.Perms) {
		c.fault(join(at, "perms"), "%s is no octal file mode such as 0644", quote(t.Perms))
	}
	c.templateText(t, join(at, "data"))
	return t
}

// templateText parses the template as an agent would and reports what it calls.
func (c *checker) templateText(t *cluster.Template, at string) {
	tree := parse.New("template")
	tree.Mode = parse.SkipFuncCheck
	set := map[string]*parse.Tree{}
	tree, err := tree.Parse(t.EmbeddedTmpl, t.LeftDelim, t.RightDelim, set)
	if err != nil {
		c.fault(at, "%s", strings.TrimPrefix(err.Error(), "template: "))
		return
	}
	if len(set) > 1 {
		c.fault(at, "define and block %s", notYet)
	}
	found := map[string]bool{}
	calls(tree.Root, found)
	for _, what := range sortedKeys(found) {
		name, isFunc := strings.CutSuffix(what, "()")
		if isFunc {
			c.fault(at, "function %s %s%s%s", quote(name), notYet, didYouMean(name, templateFuncs), known(templateFuncs))
		} else {
			c.fault(at, "%s %s", name, notYet)
		}
	}
}

// calls collects what a template uses that agents do not offer: "NAME()" for a
// function, the keyword for an action.
func calls(n parse.Node, found map[string]bool) {
	branch := func(b *parse.BranchNode) {
		calls(b.Pipe, found)
		calls(b.List, found)
		if b.ElseList != nil {
			calls(b.ElseList, found)
		}
	}
	switch n := n.(type) {
	case *parse.ListNode:
		for _, child := range n.Nodes {
			calls(child, found)
		}
	case *parse.ActionNode:
		calls(n.Pipe, found)
	case *parse.PipeNode:
		for _, cmd := range n.Cmds {
			for _, arg := range cmd.Args {
				calls(arg, found)
			}
		}
	case *parse.IdentifierNode:
		if !slices.Contains(templateFuncs, n.Ident) && !slices.Contains(builtinFuncs, n.Ident) {
			found[n.Ident+"()"] = true
		}
	case *parse.ChainNode:
		calls(n.Node, found)
	case *parse.IfNode:
		branch(&n.BranchNode)
	case *parse.WithNode:
		branch(&n.BranchNode)
	case *parse.RangeNode:
		found["range"] = true
		branch(&n.BranchNode)
	case *parse.TemplateNode:
		found["template"] = true
	}
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
