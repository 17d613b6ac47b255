package acl

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

func mustParse(t testing.TB, text string) *Policy {
	t.Helper()
	p, err := Parse(text)
	if err != nil {
		t.Fatalf("%s\n%v", text, err)
	}
	return p
}

func compiled(t testing.TB, texts ...string) *ACL {
	t.Helper()
	var all []*Policy
	for _, text := range texts {
		all = append(all, mustParse(t, text))
	}
	return Compile(all...)
}

func TestAllow(t *testing.T) {
	tests := []struct {
		rules           []string
		yes, no         string // CAPABILITY@NAMESPACE/NAME, blanks between
		someYes, someNo string // capabilities
	}{
		{rules: nil, no: "read-job@default node:read@ management@ namespace:any@default", someNo: "read-job"},
		{
			rules: []string{`namespace "default" { policy = "read" }`},
			yes:   "list-jobs@default read-job@default parse-job@default read-job-scaling@default namespace:any@default host-volume-read@default",
			no:    "submit-job@default read-logs@default read-job@other read-job@* node:read@ management@ bogus@default @default", someYes: "read-job", someNo: "submit-job management",
		},
		{
			rules: []string{`namespace "default" { policy = "write" }`},
			yes:   "submit-job@default alloc-exec@default read-logs@default scale-job@default dispatch-job@default csi-write-volume@default",
			no:    "alloc-node-exec@default sentinel-override@default csi-register-plugin@default variables:read@default/a",
		},
		{
			rules: []string{`namespace "default" { policy = "scale" }`},
			yes:   "scale-job@default read-job@default read-job-scaling@default list-scaling-policies@default",
			no:    "list-jobs@default submit-job@default",
		},
		{ // deny wins over what stands beside it, in one policy and over several
			rules: []string{"namespace \"a\" { policy = \"write\"\n capabilities = [\"deny\"] }", `namespace "b" { policy = "write" }`, `namespace "b" { policy = "deny" }`},
			no:    "read-job@a submit-job@b namespace:any@a namespace:any@b", someNo: "read-job",
		},
		{ // rules for one glob add up
			rules: []string{`namespace "a" { capabilities = ["read-job"] }`, `namespace "a" { capabilities = ["submit-job"] }`},
			yes:   "read-job@a submit-job@a", no: "list-jobs@a",
		},
		{ // only the closest rule counts
			rules: []string{`
				namespace "*" { policy = "read" }
				namespace "prod-*" { policy = "deny" }
				namespace "prod-web" { capabilities = ["list-jobs"] }
				namespace "*-web" { policy = "write" }`},
			yes: "read-job@default list-jobs@prod-web submit-job@dev-web", no: "read-job@prod-api read-job@prod-web submit-job@default read-job@prod-a-web",
		},
		{ // of equally close ones a denial, else the last by name
			rules: []string{`namespace "a-*" { policy = "read" } namespace "*-a" { policy = "deny" } namespace "b-*" { policy = "read" } namespace "*-b" { policy = "write" }`},
			yes:   "read-job@a-b read-job@b-b submit-job@c-b", no: "read-job@a-a submit-job@b-b",
		},
		{
			rules: []string{`namespace "default" {
				variables {
					path "apps/*" { capabilities = ["read", "write"] }
					path "apps/secret" { capabilities = ["deny"] }
					path "*" { capabilities = ["list"] }
				}
			}`},
			yes: "variables:read@default/apps/x variables:list@default/apps/x variables:write@default/apps/x variables:list@default/y",
			no:  "variables:destroy@default/apps/x variables:list@default/apps/secret variables:read@default/y variables:read@other/apps/x read-job@default namespace:any@default",
		},
		{
			rules: []string{`node { policy = "write" } agent { policy = "read" } operator { policy = "deny" }`, `operator { policy = "write" } quota { policy = "read" } plugin { policy = "list" }`},
			yes:   "node:read@ node:write@ agent:read@x quota:read@ plugin:list@", no: "agent:write@ operator:read@ operator:write@ quota:write@ plugin:read@",
		},
		{
			rules: []string{`node_pool "gpu-*" { policy = "write" } node_pool "*" { capabilities = ["read"] } host_volume "d" { policy = "read" }`},
			yes:   "node_pool:delete@/gpu-1 node_pool:read@/x host_volume:mount-readonly@/d", no: "node_pool:write@/x host_volume:mount-readwrite@/d host_volume:mount-readonly@/e",
		},
		{
			rules: []string{`model "fashion*" { policy = "read", capabilities = ["infer"] } model "fashion-x" { policy = "write" } model "a.b_c" { capabilities = ["push"] }`},
			yes:   "model:read@/fashion model:infer@/fashion-a model:push@/fashion-x model:alias@/fashion-x model:push@/a.b_c",
			no:    "model:push@/fashion model:infer@/a.b_c model:read@/other", someYes: "model:alias", someNo: "model:bogus",
		},
		{ // what others write on one line, with commas, with quoted keys, and as JSON
			rules: []string{
				`"namespace" "a" { policy = "read" capabilities = ["submit-job",], variables { path "x" { capabilities = ["read"] } } } # end`,
				`{"namespace": {"b": {"policy": "write"}, "c": {"capabilities": ["read-job"], "variables": {"path": {"x\/y": {"capabilities": ["list"]}}}}}, "node": {"policy": "read"}}`,
				`{"namespace": [{"d": {"policy": "read"}}, {"e": {"policy": "read"}}], "model": {"path": {"policy": "read"}}}`,
				"// all\n/* of\nit */ node_pool \"\\u0061\" { policy = \"read\" }",
			},
			yes: "submit-job@a variables:read@a/x submit-job@b read-job@c variables:list@c/x/y node:read@ read-job@d read-job@e node_pool:read@/a model:read@/path",
			no:  "submit-job@c read-job@x",
		},
	}
	for _, test := range tests {
		a := compiled(t, test.rules...)
		check := func(list string, want bool) {
			for _, ask := range strings.Fields(list) {
				c, at, _ := strings.Cut(ask, "@")
				ns, name, _ := strings.Cut(at, "/")
				if got := a.Allow(Capability(c), ns, name); got != want {
					t.Errorf("%s\n%s: %v, want %v", strings.Join(test.rules, "\n"), ask, got, want)
				}
				if !All.Allow(Capability(c), ns, name) {
					t.Errorf("a management token may not %s", ask)
				}
			}
		}
		check(test.yes, true)
		check(test.no, false)
		some := func(list string, want bool) {
			for _, c := range strings.Fields(list) {
				if got := a.AllowSome(Capability(c)); got != want {
					t.Errorf("%s\n%s somewhere: %v, want %v", strings.Join(test.rules, "\n"), c, got, want)
				}
			}
		}
		some(test.someYes, true)
		some(test.someNo, false)
	}
	if new(ACL).Allow(ReadJob, "default", "") || new(ACL).AllowSome(ReadJob) || new(ACL).IsManagement() {
		t.Error("an empty ACL allows something")
	}
}

func TestFaults(t *testing.T) {
	tests := []struct{ rules, want string }{
		{`namespac "a" { policy = "read" }`, `line 1: unknown block "namespac"; did you mean "namespace"?`},
		{"\n\nsentinel { }", `line 3: unknown block "sentinel"; known are namespace, node_pool, host_volume, model, node, agent, operator, quota, plugin`},
		{"namespace \"a\" {\n  policy = \"raed\"\n  capabilities = [\"submit_job\", \"zzzzzzzz\"]\n  bogus = \"1\"\n}\nnode \"x\" { policy = \"read\" }", strings.Join([]string{
			`line 2: invalid policy "raed" of block namespace: use read, write, scale, deny`,
			`line 3: unknown capability "submit_job" in block namespace; did you mean "submit-job"?`,
			`line 3: unknown capability "zzzzzzzz" in block namespace; the nearest known one is "read-fs"`,
			`line 4: unknown attribute "bogus" in block namespace; known are policy, capabilities, variables`,
			`line 6: block node takes no name`,
		}, "\n")},
		{"bogus {}\nnode { policy = read }", "line 1: unknown block \"bogus\"; known are namespace, node_pool, host_volume, model, node, agent, operator, quota, plugin\nline 2: expected a block in { }, or = and a string in quotes or a list of strings in [ ], got read"},
		{`namespace { policy = "read" }`, `line 1: block namespace takes one name: namespace "…"`},
		{`namespace "a" "b" { policy = "read" }`, `line 1: block namespace takes one name: namespace "…"`},
		{`namespace = "a"`, `line 1: namespace must be a block: namespace "NAME" { … }`},
		{`namespace "a b" { }`, "line 1: invalid name \"a b\" of block namespace: it must match ^[a-zA-Z0-9*-]{1,128}$"},
		{`namespace "" { }`, "line 1: invalid name \"\" of block namespace: it must match ^[a-zA-Z0-9*-]{1,128}$"},
		{`node { }`, `line 1: block node needs a policy: read, write, deny`},
		{`node { policy = "list" }`, `line 1: invalid policy "list" of block node: use read, write, deny`},
		{`node { policy = "" }`, `line 1: invalid policy "" of block node: use read, write, deny`},
		{`node { policy = ["read"] }`, `line 1: policy must be a string: read, write, deny`},
		{"node { policy = \"read\" }\nnode { policy = \"write\" }", `line 2: block node is there twice, first in line 1`},
		{"namespace \"a\" { policy = \"read\"\npolicy = \"write\" }", `line 2: policy is there twice, first in line 1`},
		{`namespace "a" { capabilities = "read-job" }`, `line 1: capabilities must be a list of strings: ["list-jobs"]`},
		{`operator { capabilities = ["read"] }`, "line 1: unknown attribute \"capabilities\" in block operator; known are policy\nline 1: block operator needs a policy: read, write, deny"},
		{`namespace "a" { variables { } }`, `line 1: variables has no paths: path "…" { capabilities = ["read"] }`},
		{`namespace "a" { variables { path "x" { policy = "read" } pth "y" { } } }`, "line 1: unknown attribute \"policy\" in block path; known are capabilities\nline 1: unknown block \"pth\" in variables; did you mean \"path\"?"},
		{`namespace "a" { variables "x" { } }`, `line 1: variables must be a block without a name: variables { … }`},
		{`namespace "a" { policy = "read"`, `line 1: expected the name of a block or attribute, got the end`},
		{`namespace "a`, `line 1: the string that begins here does not end on its line`},
		{"namespace \"a\" {}\n/* x", `line 2: the comment that begins here does not end`},
		{`node { policy = <<E`, `line 1: a heredoc cannot stand in a policy: write a string in quotes`},
		{`node ; { }`, `line 1: unexpected character ';'`},
		{`node { policy = "\x" }`, `line 1: string "\x" cannot be read: use UTF-8 and the escapes of HCL`},
		{`{"node": {"policy": "read"}} x`, `line 1: expected the end, got x`},
		{strings.Repeat(`node {`, 40), `line 1: braces are nested more than 16 deep`},
		{strings.Repeat("x", MaxRules+1), fmt.Sprintf(`line 1: the policy has %d bytes; at most %d are allowed`, MaxRules+1, MaxRules)},
	}
	for _, test := range tests {
		p, err := Parse(test.rules)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s\n got %v\nwant %s", clip(test.rules), err, test.want)
		}
		if p != nil {
			t.Errorf("%s gave a policy beside the error", clip(test.rules))
		}
	}
}

// TestRulesJSON compares with what a Nomad server answers for the same policy.
func TestRulesJSON(t *testing.T) {
	p := mustParse(t, "namespace \"default\" { \n  policy = \"read\" \n  capabilities = [\"submit-job\"] \n}\nnode { policy = \"read\" }\n")
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"Namespaces":[{"Name":"default","Policy":"read","Capabilities":["submit-job","list-jobs","parse-job","read-job","csi-list-volume","csi-read-volume","read-job-scaling","list-scaling-policies","read-scaling-policy","host-volume-read"],"Variables":null}],"NodePools":null,"HostVolumes":null,"Agent":null,"Node":{"Policy":"read"},"Operator":null,"Quota":null,"Plugin":null}`
	if string(b) != want {
		t.Errorf("got\n%s\nwant\n%s", b, want)
	}
}

// naive decides by the words of the package comment, with nothing compiled.
func naive(policies []*Policy, k *kind, name string, c string) bool {
	caps := map[string][]string{} // by glob
	for _, p := range policies {
		switch k {
		case ofNamespace:
			for _, r := range p.Namespaces {
				caps[r.Name] = append(caps[r.Name], r.Capabilities...)
			}
		case ofModel:
			for _, r := range p.Models {
				caps[r.Name] = append(caps[r.Name], r.Capabilities...)
			}
		}
	}
	if exact, ok := caps[name]; ok {
		return slices.Contains(exact, c) && !slices.Contains(exact, deny)
	}
	longest := -1
	var best []string
	for glob := range caps {
		exact := len(strings.ReplaceAll(glob, "*", ""))
		if !strings.Contains(glob, "*") || !naiveMatch(glob, name) || exact < longest {
			continue
		}
		if exact > longest {
			longest, best = exact, nil
		}
		best = append(best, glob)
	}
	if best == nil {
		return false
	}
	slices.Sort(best)
	for _, glob := range best {
		if slices.Contains(caps[glob], deny) {
			return false
		}
	}
	return slices.Contains(caps[best[len(best)-1]], c)
}

func naiveMatch(glob, name string) bool {
	if glob == "" {
		return name == ""
	}
	if glob[0] == '*' {
		return naiveMatch(glob[1:], name) || name != "" && naiveMatch(glob, name[1:])
	}
	return name != "" && glob[0] == name[0] && naiveMatch(glob[1:], name[1:])
}

func TestAgainstNaiveModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("RXVISION_TEST_SEED"); v != "" {
		fmt.Sscan(v, &seed)
	}
	t.Logf("RXVISION_TEST_SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, 2))
	word := func(letters string) string {
		b := make([]byte, 1+r.IntN(5))
		for i := range b {
			b[i] = letters[r.IntN(len(letters))]
		}
		return string(b)
	}
	pick := func(list []string) string { return list[r.IntN(len(list))] }
	for range 400 {
		var policies []*Policy
		var texts []string
		for range 1 + r.IntN(3) {
			var text strings.Builder
			for range r.IntN(6) {
				fmt.Fprintf(&text, "namespace %q { policy = %q }\n", word("ab*"), pick([]string{"read", "write", "scale", "deny", ""}))
				fmt.Fprintf(&text, "model %q { capabilities = [%q, %q] }\n", word("ab*"), pick([]string{"read", "deny", "infer"}), pick(ofModel.caps))
			}
			policies = append(policies, mustParse(t, text.String()))
			texts = append(texts, text.String())
		}
		a := Compile(policies...)
		for range 50 {
			name := word("ab")
			for _, c := range []string{"read-job", "submit-job", "list-jobs"} {
				got, want := a.Allow(Capability(c), name, ""), naive(policies, ofNamespace, name, c)
				if got != want {
					t.Fatalf("%s in namespace %s: %v, want %v, with\n%s", c, name, got, want, strings.Join(texts, "---\n"))
				}
				if got && !a.AllowSome(Capability(c)) {
					t.Fatalf("%s is allowed in %s and yet nowhere", c, name)
				}
			}
			for _, c := range ofModel.caps {
				if got, want := a.Allow(Capability("model:"+c), "", name), naive(policies, ofModel, name, c); got != want {
					t.Fatalf("%s of model %s: %v, want %v, with\n%s", c, name, got, want, strings.Join(texts, "---\n"))
				}
			}
		}
	}
}

func TestMatches(t *testing.T) {
	for _, test := range []struct {
		glob, name string
		want       bool
	}{
		{"*", "", true},
		{"", "", true},
		{"", "a", false},
		{"a*", "a", true},
		{"*a", "ba", true},
		{"*a*", "bab", true},
		{"a*b*c", "axxbyyc", true},
		{"a*b*c", "axxbyy", false},
		{"**", "x", true},
		{"*aab", "aaaab", true},
		{"a", "A", false},
	} {
		if got := matches(test.glob, test.name); got != test.want {
			t.Errorf("%q matches %q: %v", test.glob, test.name, got)
		}
	}
	long := strings.Repeat("a", 2000) // no blow-up
	if matches(strings.Repeat("a*", 60)+"b", long) {
		t.Error("matched")
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		`namespace "default" { policy = "read" capabilities = ["submit-job"] variables { path "a/*" { capabilities = ["read"] } } }`,
		`{"namespace":[{"b":{"policy":"write"}}],"node":{"policy":"read"}}`, "node {\n policy = \"read\"\n} # x", `model "a*" { policy = "write" }`, `node = { policy: "\u00e9" }`,
		"/* \n*/ quota {}", `a { b { c "d" [ { } ] } }`, "\"\\",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, err := Parse(text)
		if err != nil {
			if p != nil || err.Error() == "" {
				t.Fatalf("%v beside %+v", err, p)
			}
			lines := strings.Count(text, "\n") + 1
			for _, fault := range err.(Faults) { //nolint:errorlint // the documented type
				if fault.Line < 1 || fault.Line > lines {
					t.Fatalf("fault in line %d of %d: %s", fault.Line, lines, fault.Text)
				}
			}
			return
		}
		// What was read grants nothing that its blocks do not say, and reads back.
		a := Compile(p)
		if a.Allow(Management, "default", "") || a.IsManagement() {
			t.Fatal("a policy made a manager")
		}
		for _, ns := range p.Namespaces {
			for _, c := range ns.Capabilities {
				if c != deny && !Known(Capability(c)) {
					t.Fatalf("unknown capability %q was taken", c)
				}
			}
		}
	})
}

func TestCache(t *testing.T) {
	var c Cache
	made := 0
	get := func(key string) *ACL {
		a, err := c.Get(key, func() (*ACL, error) { made++; return new(ACL), nil })
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	first := get("0")
	for i := range MaxCached {
		get(fmt.Sprint(i))
		if get("0") != first {
			t.Fatal("what is in use was forgotten")
		}
	}
	if made != MaxCached || c.Len() != MaxCached {
		t.Errorf("made %d, kept %d, want %d", made, c.Len(), MaxCached)
	}
	get("one more")
	get("1")
	if made != MaxCached+2 || c.Len() != MaxCached {
		t.Errorf("made %d, kept %d after one more than fits", made, c.Len())
	}
	if _, err := c.Get("bad", func() (*ACL, error) { return nil, os.ErrInvalid }); err == nil || c.Len() != MaxCached {
		t.Error("an error was kept")
	}
}

func BenchmarkAllow(b *testing.B) {
	var text strings.Builder
	for i := range 100 {
		fmt.Fprintf(&text, "namespace \"team-%d-*\" { policy = \"write\" }\n", i)
	}
	a := compiled(b, text.String())
	b.ReportAllocs()
	for b.Loop() {
		if !a.Allow(SubmitJob, "team-77-prod", "") {
			b.Fatal("denied")
		}
	}
}
