// Package rxvision_test holds the architecture as a test: who may import whom, and where outside libraries may be used.
package rxvision_test

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/rxvision/rxvision/"

// rule says which packages of ours a package may import, and why no more. "*" stands for all but cmd.
type rule struct {
	pkg string
	may []string
	why string
}

// imports is the import table. Arrows point down to the nouns; siblings meet only in cmd; a package that needs something
// of a sibling declares the small interface it wants. Tests (_test.go) may import anything.
var imports = []rule{
	{"cluster", nil, "the nouns and rules must replay alike on every server and in the simulator"},
	{"cluster/internal/codecgen", []string{"cluster"}, "it writes cluster's codec from cluster's types"},
	{"acl", nil, "one pure decision that anyone may ask"},
	{"blob", nil, "bytes by digest; it knows nothing of what they mean"},
	{"proc", nil, "processes; it knows nothing of what runs in them"},
	{"oip", nil, "a public protocol, usable by clients without the rest"},
	{"ui", nil, "embedded files"},
	{"consul", nil, "an adapter behind interfaces that its users declare"},
	{"vault", nil, "an adapter behind interfaces that its users declare"},
	{"fleet/pb", nil, "generated from the protos"},
	{"agent/gpu", nil, "devices of one machine; it knows nothing of work"},
	{"agent/spot", nil, "notices about one machine; it knows nothing of work"},
	{"cron", nil, "times of expressions; it knows nothing of jobs"},
	{"jobspec", []string{"cluster", "cron"}, "it translates a job between dialects and touches nothing"},
	{"scheduler/place", []string{"cluster"}, "placement is pure: state in, plan out"},
	{"scheduler", []string{"cluster", "cron", "scheduler/place"}, "it sees the store and the metrics through interfaces of its own"},
	{"pki", nil, "certificates and the identities in them; it knows nothing of who asks"},
	{"raftstore/pb", nil, "generated from the protos"},
	{"raftstore", []string{"cluster", "blob", "raftstore/pb"}, "replication machinery; the rules live in cluster"},
	{"fleet", []string{"cluster", "fleet/pb", "pki"}, "the wire; both ends plug into it in cmd"},
	{"fleet/swarm", []string{"cluster", "fleet/pb"}, "it is what agents look like on the wire, and no more"},
	{"vision", []string{"oip"}, "pictures in, tensors out"},
	{"serve/ort", []string{"oip"}, "all cgo of ONNX Runtime, and nothing else"},
	{"serve", []string{"oip", "vision", "proc", "serve/ort"}, "a worker runs alone and knows no cluster"},
	{"agent/task", []string{"cluster", "proc", "blob"}, "a driver starts one task and knows no server"},
	{"agent", []string{"cluster", "fleet/pb", "blob", "pki", "proc", "agent/gpu", "agent/spot", "agent/task"}, "it sees servers through an interface of its own"},
	{"registry", []string{"cluster", "oip", "blob"}, "it sees the store through an interface of its own"},
	{"features", []string{"cluster", "oip", "blob"}, "it sees the store through an interface of its own"},
	{"gateway", []string{"cluster", "oip", "vision", "acl", "features", "fleet/pb"}, "the leader and the workers' insides are never on the path of an inference"},
	{"api", []string{"cluster", "cron", "jobspec", "acl", "registry", "features", "ui"}, "it sees store, scheduler and fleet through interfaces of its own"},
	{"sim", []string{"*"}, "it drives the real rules, but a program is not imported"},
	{"e2e", []string{"api", "oip"}, "black box: what a client can see, no more"},
	{"cmd/rxvision", []string{"*"}, "the one place where siblings meet; imported by nobody"},
}

// fence says which packages may use a library, named by a prefix of its import path; the longest prefix counts.
type fence struct {
	lib string
	in  []string
	why string
}

var fences = []fence{
	{"github.com/hashicorp/raft", []string{"raftstore"}, "replication is machinery behind Store"},
	{"github.com/hashicorp/raft-wal", []string{"raftstore"}, "replication is machinery behind Store"},
	{"github.com/hashicorp/raft-autopilot", []string{"raftstore"}, "replication is machinery behind Store"},
	{"github.com/NVIDIA/go-nvml", []string{"agent/gpu"}, "the tree must build and run without a GPU"},
	{"github.com/hashicorp/cronexpr", []string{"cron"}, "it may panic and is not safe for concurrent use; cron sees to both"},
	{"github.com/hashicorp/nomad", nil, "outside api and jobspec2 that module's licence (BUSL) forbids our use"},
	{"github.com/hashicorp/nomad/api", []string{"jobspec", "api"}, "Nomad's types are a dialect of the edge, not our nouns"},
	{"github.com/hashicorp/nomad/jobspec2", []string{"jobspec"}, "one package parses job files"},
	{"github.com/hashicorp/hcl", []string{"jobspec", "acl", "cmd/rxvision"}, "HCL is a format of job files, policies and configuration"},
	{"github.com/hashicorp/consul", []string{"consul"}, "the platform runs without Consul"},
	{"github.com/hashicorp/vault", []string{"vault"}, "the platform runs without Vault"},
	{"github.com/spf13", []string{"cmd/rxvision"}, "flags belong to the program; packages take plain structs"},
	{"os/exec", []string{"proc"}, "only proc starts processes, so that each is limited, found again and ended"},
	{"C", []string{"agent/gpu", "serve/ort"}, "cgo is kept to the two libraries that need it"},
}

// pure packages give the same result on every server and in every replay: no clock, randomness, goroutine, I/O, logger.
var (
	pure        = []string{"cluster", "scheduler/place"}
	impureLibs  = []string{"crypto/rand", "log", "math/rand", "net", "os", "runtime", "syscall", "testing"}
	impureTimes = []string{"After", "AfterFunc", "NewTicker", "NewTimer", "Now", "Since", "Sleep", "Tick", "Until"}
)

const pureWhy = "the same entry must give the same state on every server, and a plan must replay"

// file is a Go source file with what this test wants to know of it; build tags are not considered, so all files count.
type file struct {
	path, pkg string // relative to the root, slashes
	test      bool
	syntax    *ast.File
	set       *token.FileSet
}

func (f file) imports() (paths []string) {
	for _, spec := range f.syntax.Imports {
		p, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			panic(err) // the parser has accepted it
		}
		paths = append(paths, p)
	}
	return paths
}

// sources parses every Go file of this module, leaving out other modules, hidden folders, testdata and build output.
func sources(t *testing.T) (files []file) {
	t.Helper()
	set, root := token.NewFileSet(), os.DirFS(".")
	err := fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			_, modErr := fs.Stat(root, path.Join(name, "go.mod"))
			base := path.Base(name)
			if name != "." && (modErr == nil || base[0] == '.' || base[0] == '_' || base == "testdata" || base == "node_modules" || name == "out") {
				return fs.SkipDir
			}
			return nil
		}
		if path.Ext(name) != ".go" {
			return nil
		}
		src, err := fs.ReadFile(root, name)
		if err != nil {
			return err
		}
		syntax, err := parser.ParseFile(set, name, src, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		files = append(files, file{name, path.Dir(name), strings.HasSuffix(name, "_test.go"), syntax, set})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 2 {
		t.Fatal("found no sources: run the test in the root of the module")
	}
	return files
}

// isHelper holds for packages of test helpers like serve/ort/onnxtest: they import nothing of ours, and only tests import
// them. They need no row in the table and may use any library.
func isHelper(pkg string) bool { return pkg != "." && strings.HasSuffix(pkg, "test") }

func ruleOf(pkg string) *rule {
	i := slices.IndexFunc(imports, func(r rule) bool { return r.pkg == pkg })
	if i < 0 {
		return nil
	}
	return &imports[i]
}

func TestImportTable(t *testing.T) {
	unknown := map[string]bool{}
	for _, f := range sources(t) {
		r := ruleOf(f.pkg)
		switch {
		case f.pkg == ".":
			continue
		case isHelper(f.pkg):
			r = &rule{pkg: f.pkg, why: "a test helper must be usable from everywhere"}
		case r == nil:
			if !unknown[f.pkg] {
				t.Errorf("package %s has no row in the import table: decide what it may import and why, add the row in deps_test.go, run\n"+
					"\tgo test -run TestDepguard -update .\nand name it in ARCHITECTURE.md; a package of test helpers is called …test instead", f.pkg)
				unknown[f.pkg] = true
			}
			continue
		}
		for _, p := range f.imports() {
			ours, ok := strings.CutPrefix(p, module)
			if !ok || f.test && f.pkg != "e2e" {
				continue
			}
			switch {
			case isHelper(ours) && !f.test:
				t.Errorf("%s imports %s: a package of test helpers is for _test.go files", f.path, ours)
			case isHelper(ours), slices.Contains(r.may, ours), slices.Contains(r.may, "*") && !strings.HasPrefix(ours, "cmd/"):
			default:
				t.Errorf("%s imports %s\n\t%s may import %s: %s", f.path, ours, f.pkg, list(r.may), r.why)
			}
		}
	}
}

func TestImportTableHasNoCycle(t *testing.T) {
	// A row may name only packages of rows above it, which makes the table itself a proof.
	seen := map[string]bool{}
	for _, r := range imports {
		if seen[r.pkg] || isHelper(r.pkg) || r.why == "" {
			t.Errorf("row %s: doubled, named like a test helper, or without a reason", r.pkg)
		}
		for _, p := range r.may {
			if p != "*" && !seen[p] {
				t.Errorf("row %s names %s, which has no row above it", r.pkg, p)
			}
		}
		seen[r.pkg] = true
	}
}

// fenceOf returns the fence with the longest prefix of the import path, or nil.
func fenceOf(imported string) (best *fence) {
	for i, f := range fences {
		if (imported == f.lib || strings.HasPrefix(imported, f.lib+"/")) && (best == nil || len(f.lib) > len(best.lib)) {
			best = &fences[i]
		}
	}
	return best
}

func TestFences(t *testing.T) {
	for _, f := range sources(t) {
		if f.test || isHelper(f.pkg) {
			continue
		}
		for _, p := range f.imports() {
			if fence := fenceOf(p); fence != nil && !slices.Contains(fence.in, f.pkg) {
				t.Errorf("%s imports %s\n\tonly %s may: %s", f.path, p, list(fence.in), fence.why)
			}
		}
	}
}

func TestPurePackages(t *testing.T) {
	for _, f := range sources(t) {
		if f.test || !slices.Contains(pure, f.pkg) {
			continue
		}
		for _, p := range f.imports() {
			for _, lib := range impureLibs {
				if p == lib || strings.HasPrefix(p, lib+"/") {
					t.Errorf("%s imports %s: %s", f.path, p, pureWhy)
				}
			}
		}
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				t.Errorf("%s starts a goroutine: %s", f.set.Position(n.Pos()), pureWhy)
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains(impureTimes, n.Sel.Name) {
					t.Errorf("%s uses time.%s: %s; time comes in with the command", f.set.Position(n.Pos()), n.Sel.Name, pureWhy)
				}
			}
			return true
		})
	}
}

func list(names []string) string {
	switch {
	case len(names) == 0:
		return "nothing of ours"
	case slices.Contains(names, "*"):
		return "all but cmd"
	}
	return strings.Join(names, ", ")
}

var update = flag.Bool("update", false, "write the import table into .golangci.yml")

// TestDepguard keeps the linter's copy of the two tables, which editors show while one types, equal to the tables.
func TestDepguard(t *testing.T) {
	const name, begin, end = ".golangci.yml", "      # begin of the import table\n", "      # end of the import table\n"
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok1 := strings.Cut(string(raw), begin)
	old, tail, ok2 := strings.Cut(rest, end)
	if !ok1 || !ok2 {
		t.Fatalf("%s has no lines %q and %q", name, begin, end)
	}
	table := depguard()
	switch {
	case old == table:
	case *update:
		if err := os.WriteFile(name, []byte(head+begin+table+end+tail), 0o644); err != nil {
			t.Fatal(err)
		}
	default:
		t.Errorf("%s differs from the import table: run\n\tgo test -run TestDepguard -update .", name)
	}
}

// depguard renders the tables as lists of golangci-lint's depguard: one for each package and one for each fence.
func depguard() string {
	var b strings.Builder
	write := func(name string, files []string, deny, why string, allow []string) {
		fmt.Fprintf(&b, "        %s:\n          list-mode: lax\n          files: %s\n", strings.NewReplacer("/", "-", ".", "-").Replace(name), quote(files))
		fmt.Fprintf(&b, "          deny: [{pkg: %q, desc: %q}]\n", deny, why)
		if len(allow) > 0 {
			fmt.Fprintf(&b, "          allow: %s\n", quote(allow))
		}
	}
	for _, r := range imports {
		var allow []string
		for _, p := range r.may {
			allow = append(allow, module+p+"$") // without $, depguard takes it for a prefix
		}
		if slices.Contains(r.may, "*") {
			write(r.pkg, []string{"**/" + r.pkg + "/*.go", "!$test"}, module+"cmd", r.why, nil)
			continue
		}
		write(r.pkg, []string{"**/" + r.pkg + "/*.go", "!$test"}, strings.TrimSuffix(module, "/"), r.why, allow)
	}
	for _, f := range fences {
		files := []string{"$all", "!$test", "!**/*test/*.go"}
		for _, p := range f.in {
			files = append(files, "!**/"+p+"/*.go")
		}
		var allow []string // narrower fences speak for themselves
		for _, other := range fences {
			if strings.HasPrefix(other.lib, f.lib+"/") {
				allow = append(allow, other.lib)
			}
		}
		name, lib := "fence-"+path.Base(f.lib), f.lib
		if lib == "C" {
			name, lib = "fence-cgo", "C$"
		}
		write(name, files, lib, f.why, allow)
	}
	return b.String()
}

// quote renders a list of YAML, in which double-quoted text reads as in Go.
func quote(list []string) string { return strings.ReplaceAll(fmt.Sprintf("%q", list), `" "`, `", "`) }
