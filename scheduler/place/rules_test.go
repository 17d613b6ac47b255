package place

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

func TestConstraints(t *testing.T) {
	n := &cluster.Node{
		ID: "id1", Name: "host1", Datacenter: "dc1", NodeClass: "big", NodePool: "gpu",
		Attributes: map[string]string{"cpu.arch": "amd64", "cores": "10", "load": "1.5", "os.version": "6.1.0-rc.2", "drivers": "a, b,c", "empty": ""},
		Meta:       map[string]string{"rack": "r1"},
	}
	for _, c := range []struct {
		left, operand, right string
		want                 bool
	}{
		{"${attr.cpu.arch}", "=", "amd64", true},
		{"${attr.cpu.arch}", "", "amd64", true},
		{"${attr.cpu.arch}", "==", "arm64", false},
		{"${attr.cpu.arch}", "is", "amd64", true},
		{"${attr.cpu.arch}", "!=", "arm64", true},
		{"${attr.cpu.arch}", "not", "amd64", false},
		{"${attr.none}", "=", "", false},
		{"${attr.none}", "!=", "x", true}, // what is not there is not x
		{"${attr.none}", "is_set", "", false},
		{"${attr.none}", "is_not_set", "", true},
		{"${attr.empty}", "is_set", "", true},
		{"${nothing.known}", "is_set", "", false},
		{"${node.unique.id}", "=", "id1", true},
		{"${node.unique.name}", "regexp", "^host[0-9]$", true},
		{"${node.datacenter}", "=", "dc1", true},
		{"${node.class}", "=", "big", true},
		{"${node.pool}", "=", "gpu", true},
		{"${meta.rack}", "regexp", "r[2-9]", false},
		{"${meta.rack}", "regexp", "(", false}, // does not compile
		{"${attr.cores}", ">", "9", true},      // as numbers; as text "10" < "9"
		{"${attr.cores}", "<=", "10", true},
		{"${attr.load}", ">=", "1.50", true},
		{"${attr.load}", "<", "1.5", false},
		{"${meta.rack}", "<", "r2", true}, // as text
		{"${attr.none}", "<", "5", false},
		{"dc1", "=", "${node.datacenter}", true},
		{"${attr.drivers}", "set_contains", "a,c", true},
		{"${attr.drivers}", "set_contains_all", "a,d", false},
		{"${attr.drivers}", "set_contains_any", "d, b", true},
		{"${attr.drivers}", "no-such-operand", "a", false},
		{"${attr.os.version}", "semver", ">= 6.0.0, < 7.0.0", true},
		{"${attr.os.version}", "version", ">= 6.0.0", false}, // a pre-release
	} {
		at := nodeLookup(n)
		left, lf := at(c.left)
		right, rf := at(c.right)
		if got := holds(c.operand, left, right, lf, rf, patternCache{}); got != c.want {
			t.Errorf("%s %s %s: %v, want %v", c.left, c.operand, c.right, got, c.want)
		}
	}
}

func TestVersions(t *testing.T) {
	for _, c := range []struct {
		version, constraint string
		loose, semver       bool
	}{
		{"1.2.3", "1.2.3", true, true},
		{"1.2.3", "= 1.2.3", true, true},
		{"1.2.3", "!= 1.2.3", false, false},
		{"1.2.3", "> 1.2.2, < 1.3.0", true, true},
		{"1.2.3", "> 1.2.2, < 1.2.3", false, false},
		{"1.10.0", "> 1.9.0", true, true},
		{"1.2", ">= 1.2.0", true, false}, // semver wants three numbers
		{"v1.2.3", ">= 1.2.0", true, false},
		{"535.129.03", ">= 535.0.0", true, false}, // a driver's version
		{"1.2.3", "~> 1.2.0", true, false},
		{"1.3.0", "~> 1.2.0", false, false},
		{"1.9.9", "~> 1.2", true, false},
		{"2.0.0", "~> 1.2", false, false},
		{"1.7.0-beta1", ">= 1.6.0", false, true},
		{"1.7.0-beta1", ">= 1.7.0-alpha", true, true},
		{"1.7.0-beta1", "< 1.7.0", false, true},
		{"1.7.0-beta.2", "> 1.7.0-beta.11", false, false},
		{"1.7.0-1", "< 1.7.0-alpha", true, true},
		{"1.7.0+build5", "= 1.7.0", true, true},
		{"", ">= 1.0.0", false, false},
		{"one", ">= 1.0.0", false, false},
		{"1.0.0", ">= one", false, false},
		{"1.0.0", "", false, false},
		{"1.0.0", "=> 1.0.0", false, false},
		{"99999999999999999999.0.0", "> 1.0.0", false, false},
	} {
		if got := versionHolds(c.version, c.constraint, false); got != c.loose {
			t.Errorf("version %q %q: %v", c.version, c.constraint, got)
		}
		if got := versionHolds(c.version, c.constraint, true); got != c.semver {
			t.Errorf("semver %q %q: %v", c.version, c.constraint, got)
		}
	}
}

func TestDeviceConstraints(t *testing.T) {
	num := func(n int64, unit string) *cluster.Attribute { return &cluster.Attribute{Int: &n, Unit: unit} }
	text, yes := "8.0", true
	g := &cluster.NodeDeviceResource{
		Vendor: "nvidia", Type: "gpu", Name: "NVIDIA A100/80",
		Instances: []*cluster.NodeDevice{{ID: "GPU-1", Healthy: true}, {ID: "GPU-2", Healthy: true}},
		Attributes: map[string]*cluster.Attribute{
			"memory": num(81920, "MiB"), "bar1": num(128, "GB"), "clock": num(1410, "MHz"), "power": num(400, "W"),
			"bandwidth": num(2039, "GB/s"), "cores": num(6912, ""), "compute": {String: &text}, "mig": {Bool: &yes}, "odd": num(3, "furlong"),
		},
	}
	for _, c := range []struct {
		left, operand, right string
		want                 bool
	}{
		{"${device.model}", "=", "NVIDIA A100/80", true},
		{"${device.vendor}", "=", "nvidia", true},
		{"${device.type}", "=", "gpu", true},
		{"${device.ids}", "set_contains", "GPU-2", true},
		{"${device.ids}", "set_contains", "GPU-3", false},
		{"${device.attr.memory}", ">=", "80 GiB", true},
		{"${device.attr.memory}", ">", "80 GiB", false},
		{"${device.attr.memory}", "=", "80GiB", true},
		{"${device.attr.memory}", ">", "85 GB", true}, // 85.9
		{"${device.attr.memory}", ">", "86 GB", false},
		{"${device.attr.memory}", ">", "79.5 GiB", true},
		{"${device.attr.memory}", ">", "1000 MHz", false}, // another measure
		{"${device.attr.memory}", ">", "70", false},       // no measure at all
		{"${device.attr.memory}", ">", "much", false},
		{"${device.attr.memory}", "is_set", "", true},
		{"${device.attr.none}", "is_not_set", "", true},
		{"${device.attr.clock}", ">=", "1.4 GHz", true},
		{"${device.attr.power}", "<=", "0.4 kW", true},
		{"${device.attr.bandwidth}", ">", "1.5 TB/s", true},
		{"${device.attr.cores}", ">", "5000", true},
		{"${device.attr.cores}", "=", "6912", true},
		{"${device.attr.compute}", "version", ">= 7.5", true},
		{"${device.attr.mig}", "=", "true", true},
		{"${device.attr.odd}", "=", "3 furlong", true},
		{"${device.unknown}", "is_set", "", false},
	} {
		con := &cluster.Constraint{LTarget: c.left, Operand: c.operand, RTarget: c.right}
		if got := deviceHolds(con, g, patternCache{}); got != c.want {
			t.Errorf("%s: %v, want %v", con, got, c.want)
		}
	}
	for name, want := range map[string]bool{
		"gpu": true, "nvidia/gpu": true, "nvidia/gpu/NVIDIA A100/80": true, // a model's name may hold a slash
		"nvidia": false, "amd/gpu": false, "nvidia/gpu/T4": false, "": false,
	} {
		if deviceNamed(name, g) != want {
			t.Errorf("device %q: want %v", name, want)
		}
	}
}

func TestRescheduleDelays(t *testing.T) {
	const base = 10 * time.Second
	for _, c := range []struct {
		function string
		delays   []time.Duration // of the events so far
		lived    time.Duration   // since the last of them
		want     time.Duration
	}{
		{"constant", nil, 0, 10 * time.Second},
		{"constant", []time.Duration{base, base, base}, time.Second, 10 * time.Second},
		{"exponential", nil, 0, 10 * time.Second},
		{"exponential", []time.Duration{base}, time.Second, 20 * time.Second},
		{"exponential", []time.Duration{base, 20 * time.Second}, time.Second, 40 * time.Second},
		{"exponential", []time.Duration{50 * time.Second}, time.Second, 60 * time.Second}, // max_delay
		{"exponential", []time.Duration{40 * time.Second}, time.Hour, 10 * time.Second},   // it ran well for long: begin anew
		{"fibonacci", []time.Duration{base}, time.Second, 10 * time.Second},
		{"fibonacci", []time.Duration{base, base}, time.Second, 20 * time.Second},
		{"fibonacci", []time.Duration{base, base, 20 * time.Second}, time.Second, 30 * time.Second},
		{"fibonacci", []time.Duration{60 * time.Second, base}, time.Second, 10 * time.Second}, // just begun anew
	} {
		p := &cluster.ReschedulePolicy{Delay: base, DelayFunction: c.function, MaxDelay: time.Minute, Unlimited: true}
		a := &cluster.Allocation{ModifyTime: int64(epoch), RescheduleTracker: &cluster.RescheduleTracker{}}
		for _, d := range c.delays {
			a.RescheduleTracker.Events = append(a.RescheduleTracker.Events, &cluster.RescheduleEvent{Delay: d, RescheduleTime: int64(epoch.Add(-c.lived))})
		}
		if got := nextDelay(p, a); got != c.want {
			t.Errorf("%s after %v, %s ago: %s, want %s", c.function, c.delays, c.lived, got, c.want)
		}
	}
}

func TestRescheduleAttempts(t *testing.T) {
	at := func(ages ...time.Duration) *cluster.Allocation {
		a := &cluster.Allocation{ModifyTime: int64(epoch), RescheduleTracker: &cluster.RescheduleTracker{}}
		for _, d := range ages {
			a.RescheduleTracker.Events = append(a.RescheduleTracker.Events, &cluster.RescheduleEvent{RescheduleTime: int64(epoch.Add(-d))})
		}
		return a
	}
	two := &cluster.ReschedulePolicy{Attempts: 2, Interval: time.Hour, DelayFunction: "constant"}
	for i, c := range []struct {
		policy *cluster.ReschedulePolicy
		alloc  *cluster.Allocation
		want   bool
	}{
		{nil, at(), false},
		{&cluster.ReschedulePolicy{}, at(), false},
		{two, at(), true},
		{two, at(time.Minute), true},
		{two, at(2*time.Minute, time.Minute), false},
		{two, at(2*time.Hour, time.Minute), true}, // the first is out of the interval
		{&cluster.ReschedulePolicy{Unlimited: true}, at(5, 4, 3, 2, 1), true},
	} {
		if _, got := nextReschedule(c.policy, c.alloc); got != c.want {
			t.Errorf("case %d: %v, want %v", i, got, c.want)
		}
	}
	a := at(1, 2, 3, 4, 5)
	if es := track(a, &cluster.RescheduleEvent{PrevAllocID: "x"}, epoch).Events; len(es) != cluster.MaxRescheduleEvents || es[4].PrevAllocID != "x" {
		t.Errorf("the tracker keeps %d events", len(es))
	}
	if len(a.RescheduleTracker.Events) != 5 || a.RescheduleTracker.Events[0].PrevAllocID != "" {
		t.Error("tracking changed the old allocation's events")
	}
}

func TestNameIndex(t *testing.T) {
	for name, want := range map[string]int{"web.g[0]": 0, "a[1].g[12]": 12, "web.g": -1, "web.g[x]": -1, "": -1, "[3": -1} {
		if got := nameIndex(name); got != want {
			t.Errorf("%q: %d, want %d", name, got, want)
		}
	}
}

func TestPorts(t *testing.T) {
	r := parsePortRanges("22, 80,8000-8002,x,9-y")
	for port, want := range map[int]bool{22: true, 80: true, 8000: true, 8002: true, 8003: false, 9: false} {
		if r.has(port) != want {
			t.Errorf("port %d: want %v", port, want)
		}
	}
	taken := map[int]bool{}
	for range 5 { // every seed finds each port of the range once
		taken[firstFree(100, 104, 1<<63+7, func(p int) bool { return !taken[p] })] = true
	}
	if len(taken) != 5 || taken[0] {
		t.Errorf("taken %v", taken)
	}
	if p := firstFree(100, 104, 3, func(p int) bool { return !taken[p] }); p != 0 {
		t.Errorf("a full range gave port %d", p)
	}
}

// TestSpreadsAreExact places on nodes that are loaded at random: an even spread leaves
// no value more than one behind another, and one with targets gives each value its
// share, where these are whole numbers.
func TestSpreadsAreExact(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 1))
	for round := range 200 {
		racks := 2 + rnd.IntN(4)
		percents, left := make([]int, racks), 10
		block := "spread ${meta.rack}"
		even := round%2 == 0
		for i := range percents {
			percents[i] = rnd.IntN(left + 1)
			if i == racks-1 {
				percents[i] = left
			}
			left -= percents[i]
			if !even {
				block += fmt.Sprintf(" r%d=%d", i, 10*percents[i])
			}
		}
		w := &world{}
		for i := range racks * (1 + rnd.IntN(4)) {
			w.nodes = append(w.nodes, mustLine(t, fmt.Sprintf("n%02d meta.rack=r%d cpu=8000 memory=8000 disk=20000", i, i%racks)).node())
			w.allocs = append(w.allocs, mustLine(t, fmt.Sprintf("x%d other.g[%d] on n%02d cpu=%d memory=%d", i, i, i, rnd.IntN(5000), rnd.IntN(5000))).alloc(w.nodes))
		}
		count := 10 * (1 + rnd.IntN(2))
		for _, s := range []string{"job j type=batch", fmt.Sprintf("group g count=%d disk=10", count), block, "task t cpu=50 memory=50"} {
			w.version(mustLine(t, s), 0)
		}
		got := map[string]int{}
		for _, a := range planAll(w).Plan.Place {
			for _, n := range w.nodes {
				if n.ID == a.NodeID {
					got[n.Meta["rack"]]++
				}
			}
		}
		for i, p := range percents {
			have := got[fmt.Sprintf("r%d", i)]
			want, slack := p*count/10, 0
			if even {
				want, slack = count/racks, min(count%racks, 1)
			}
			if have < want || have > want+slack {
				t.Errorf("round %d, %s, count %d, %d nodes: r%d has %d, want %d", round, block, count, len(w.nodes), i, have, want)
			}
		}
	}
}

func mustLine(tb testing.TB, text string) *line {
	tb.Helper()
	l, err := parseLine(text)
	if err != nil {
		tb.Fatal(err)
	}
	return l
}

// planAll answers an evaluation of the world's only job.
func planAll(w *world) *Result {
	j := w.versions[0]
	eval := &cluster.Evaluation{ID: "e", Namespace: j.Namespace, JobID: j.ID, Type: j.Type, Status: cluster.EvalStatusPending}
	ids := 0
	return NewView(w).Plan(Input{Job: j, Eval: eval, Now: epoch, NewID: func() string { ids++; return fmt.Sprint(ids) }})
}

// TestKeysTellDemandsApart: nodes that were judged for one demand serve another only
// if they would be judged alike.
func TestKeysTellDemandsApart(t *testing.T) {
	key := func(ofJob, ofDevice string) string {
		w := &world{}
		for _, s := range []string{"job j", ofJob, "group g", "task t", "device gpu", ofDevice} {
			if s != "" {
				w.version(mustLine(t, s), 0)
			}
		}
		return string(newDemand(w.versions[0], w.versions[0].TaskGroups[0]).key(false))
	}
	keys := map[string]string{key("", ""): "nothing"}
	for _, block := range []string{
		"affinity ${meta.a} = x", "affinity ${meta.b} = x", "affinity ${meta.a} != x", "affinity ${meta.a} = y", "affinity ${meta.a} = x weight=-50",
		"constraint ${meta.a} = x", "constraint ${meta.a} distinct_property", "constraint ${meta.b} distinct_property",
	} {
		for where, k := range map[string]string{"job": key(block, ""), "device": key("", block)} {
			if strings.Contains(block, operandDistinctProperty) && where == "device" {
				continue // has no such thing
			}
			if other, there := keys[k]; there {
				t.Errorf("%q of the %s has the key of %q", block, where, other)
			}
			keys[k] = block + " of the " + where
		}
	}
	if key("spread ${meta.a}", "") != key("", "") || key("constraint ${meta.b} distinct_property 2", "") != key("constraint ${meta.b} distinct_property", "") {
		t.Error("what depends on the job's other allocations has a key of its own")
	}
}

// TestPropertiesAreBounded asks for more attributes, and names more values, than are kept.
func TestPropertiesAreBounded(t *testing.T) {
	w := &world{}
	for i := range 2 * maxValuesNamed {
		w.nodes = append(w.nodes, mustLine(t, fmt.Sprintf("n%02d", i)).node())
	}
	v := NewView(w)
	for i := range 3 * maxProperties {
		if v.property(fmt.Sprintf("${meta.m%d}", i)); len(v.properties) > maxProperties {
			t.Fatalf("%d attributes are kept", len(v.properties))
		}
	}
	for _, s := range []string{"job j type=batch", "group g count=100", "constraint ${node.unique.name} distinct_property", "task t"} {
		w.version(mustLine(t, s), 0)
	}
	r := planAll(w)
	filtered := r.Failed["g"].ConstraintFiltered
	if len(r.Plan.Place) != len(w.nodes) || len(filtered) != maxValuesNamed+1 || filtered[operandDistinctProperty] != len(w.nodes)-maxValuesNamed {
		t.Errorf("%d placed; refused: %v", len(r.Plan.Place), filtered)
	}
}

// A job that is taken back names its models by number: what an alias meant before goes on.
func TestModelNamesRestartNothing(t *testing.T) {
	job := func(config string, m cluster.ModelRef) *cluster.Job {
		g := &cluster.TaskGroup{Name: "g", Tasks: []*cluster.Task{{Name: "t", Driver: "onnx", Config: []byte(config), Model: &m}}}
		return &cluster.Job{TaskGroups: []*cluster.TaskGroup{g}}
	}
	was := job(`{"model":"m@prod","threads":2}`, cluster.ModelRef{Reference: "m@prod", Name: "m", Alias: "prod", Version: 1, Digest: "a"})
	for _, c := range []struct {
		now  *cluster.Job
		same bool
	}{
		{job(`{"model":"m:1","threads":2}`, cluster.ModelRef{Reference: "m:1", Name: "m", Version: 1, Digest: "a"}), true},
		{job(`{"model":"m@prod","threads":2}`, cluster.ModelRef{Reference: "m@prod", Name: "m", Alias: "prod", Version: 2, Digest: "b"}), false},
		{job(`{"model":"m@prod","threads":3}`, cluster.ModelRef{Reference: "m@prod", Name: "m", Alias: "prod", Version: 1, Digest: "a"}), false},
	} {
		if got := sameStart(was, was.TaskGroups[0], c.now, c.now.TaskGroups[0]); got != c.same {
			t.Errorf("to %s: runs on is %t", c.now.TaskGroups[0].Tasks[0].Config, got)
		}
	}
}

// BenchmarkPlan places one job of 1,000 allocations on 1,000 nodes.
func BenchmarkPlan(b *testing.B) {
	for name, block := range map[string]string{
		"plain": "", "affinity": "affinity ${attr.x} = 1", "spread": "spread ${attr.x} 0=70", "hosts": "constraint ${node.unique.id} distinct_property 2",
	} {
		b.Run(name, func(b *testing.B) {
			w := &world{}
			for i := range 1000 {
				w.nodes = append(w.nodes, mustLine(b, fmt.Sprintf("n%04d cpu=100000 memory=100000 disk=1000000 attr.x=%d", i, i%3)).node())
			}
			for _, s := range []string{"job j type=batch", "group g count=1000", "constraint ${attr.x} != 2", block, "task t"} {
				if s != "" {
					w.version(mustLine(b, s), 0)
				}
			}
			for b.Loop() {
				if r := planAll(w); len(r.Plan.Place) != 1000 {
					b.Fatalf("placed %d", len(r.Plan.Place))
				}
			}
		})
	}
}
