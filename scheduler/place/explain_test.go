package place

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/tools/txtar"

	"github.com/rxvision/rxvision/cluster"
)

// explainText reads a scenario without a plan and explains its job.
func explainText(t *testing.T, text string, change ...func(*world)) (*world, *cluster.Explanation) {
	t.Helper()
	w := &world{}
	var job *cluster.Job
	for _, f := range txtar.Parse([]byte(text)).Files {
		for _, row := range strings.Split(string(f.Data), "\n") {
			l, err := parseLine(row)
			if err != nil {
				t.Fatal(err)
			}
			if l == nil {
				continue
			}
			switch f.Name {
			case "nodes":
				w.nodes = append(w.nodes, l.node())
			case "others":
				w.version(l, 1)
			case "job":
				job = w.version(l, 1)
			case "waiting":
				w.short = append(w.short, w.waits(l))
			case "running":
				w.allocs = append(w.allocs, l.alloc(w.nodes))
			case "preempt":
				w.config.PreemptionConfig = cluster.PreemptionConfig{ServiceSchedulerEnabled: true, BatchSchedulerEnabled: true}
			}
		}
	}
	for _, c := range change {
		c(w)
	}
	for _, a := range w.allocs {
		w.fill(t, a)
	}
	w.lineUp()
	ids := 0
	eval := &cluster.Evaluation{
		ID: "eval", Namespace: job.Namespace, JobID: job.ID, Type: job.Type, Priority: job.Priority,
		TriggeredBy: cluster.TriggerJobRegister, Status: cluster.EvalStatusPending,
	}
	return w, NewView(w).Explain(Input{Job: job, Eval: eval, Now: epoch, NewID: func() string { ids++; return fmt.Sprint("id", ids) }})
}

// full is two nodes of two GPUs each that low and firm hold, one that is drained and one without GPUs.
const full = `
-- nodes --
n1 gpu=A100 gpus=2
n2 gpu=A100 gpus=2
n3 gpu=A100 gpus=2 draining
n4
-- others --
job low type=batch priority=20
group g count=3
task t
device nvidia/gpu
job firm type=batch priority=50
group g count=1
task t
device nvidia/gpu
-- running --
a1 low.g[0] on n1 up=1h
a2 low.g[1] on n1 up=2h checkpoint=10m
a3 low.g[2] on n2 up=3h
a4 firm.g[0] on n2 up=4h
`

const wantsGPU = `
-- job --
job train type=batch priority=50
group g count=2
task t
device nvidia/gpu
`

// TestExplainHolders compares what is told of holders with a count of the state that knows nothing of placement.
func TestExplainHolders(t *testing.T) {
	w, x := explainText(t, full+wantsGPU)
	g := x.Groups[0]
	if g.Queued != 2 || g.Desired != 2 || len(g.Places) != 0 {
		t.Fatalf("%+v", g)
	}
	if n := g.Nodes; n.Total != 4 || n.Full != 2 || n.Filtered != 1 || n.NotReady["draining"] != 1 || n.Free != 0 {
		t.Errorf("nodes %+v", n)
	}
	if len(g.Filters) != 1 || g.Filters[0].Reason != "missing devices" || !slices.Equal(g.Filters[0].Examples, []string{"n4"}) {
		t.Errorf("filters %+v", g.Filters)
	}
	if len(g.Shortages) != 1 {
		t.Fatalf("shortages %+v", g.Shortages)
	}
	s := g.Shortages[0]
	held := map[string]int64{}
	total := int64(0)
	for _, n := range w.nodes {
		if !n.Ready() || len(n.NodeResources.Devices) == 0 {
			continue
		}
		total += int64(len(n.NodeResources.Devices[0].Instances))
		for _, a := range w.allocs {
			if a.NodeID == n.ID {
				held[a.JobID] += int64(len(a.AllocatedResources.Tasks["t"].Devices[0].DeviceIDs)) * cluster.WholeMilli
			}
		}
	}
	if s.What != "nvidia/gpu" || s.Asked != 1 || s.Nodes != 2 || s.Total != total || s.Free != 0 || s.Unit != unitDevices {
		t.Errorf("shortage %+v, %d devices", s, total)
	}
	for _, h := range g.Holders {
		if h.Milli != held[h.JobID] {
			t.Errorf("%s holds %d, told %d", h.JobID, held[h.JobID], h.Milli)
		}
		delete(held, h.JobID)
	}
	if len(held) != 0 || g.Others != nil {
		t.Errorf("not told of: %v, %+v", held, g.Others)
	}
	low, firm := g.Holders[0], g.Holders[1]
	if low.JobID != "low" || low.Allocs != 3 || low.Nodes != 2 || low.Preemptible != 3 || low.Since != epoch.Add(-3*time.Hour) || low.Until != 0 {
		t.Errorf("%+v", low)
	}
	if firm.Preemptible != 0 || len(firm.Obstacles) != 1 || firm.Obstacles[0].Kind != cluster.ObstaclePriority {
		t.Errorf("%+v", firm)
	}
	if g.Start == nil || g.Start.Now || g.Start.Never || g.Start.At != 0 || len(g.Start.Because) != 2 {
		t.Errorf("start %+v", g.Start)
	}
}

// TestExplainPreemption: what stands in the way of preempting, from the switch to priorities, and what is done without.
func TestExplainPreemption(t *testing.T) {
	for _, c := range []struct {
		name, job, more string
		change          func(*world)
		helps           bool
		obstacles       string
	}{
		{"switch", "priority=50", "", nil, true, "switch"},
		{"priority", "priority=25", "-- preempt --\non\n", nil, true, "priority"},
		{"never", "priority=50", "-- preempt --\non\n", func(w *world) {
			w.versions[0].TaskGroups[0].Preempt = &cluster.PreemptPolicy{Never: true}
		}, true, "rx_preemptible"},
		{"min runtime", "priority=50", "-- preempt --\non\n", func(w *world) {
			w.versions[0].TaskGroups[0].Preempt = &cluster.PreemptPolicy{MinRuntime: 5 * time.Hour}
		}, true, "rx_min_runtime"},
		{"all at once", "priority=50 all_at_once", "-- preempt --\non\n", nil, true, "all_at_once"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var change []func(*world)
			if c.change != nil {
				change = append(change, c.change)
			}
			_, x := explainText(t, full+strings.Replace(wantsGPU, "priority=50", c.job, 1)+c.more, change...)
			p := x.Groups[0].Preempt
			if p == nil || p.Helps != c.helps {
				t.Fatalf("%+v", p)
			}
			var kinds []string
			for _, o := range p.Obstacles {
				kinds = append(kinds, o.Kind)
			}
			if got := strings.Join(kinds, " "); got != c.obstacles || len(p.Victims) == 0 {
				t.Errorf("obstacles %q, want %q; %d victims", got, c.obstacles, len(p.Victims))
			}
			if len(x.Preempts) != 0 {
				t.Errorf("preempts %+v", x.Preempts)
			}
		})
	}
	_, x := explainText(t, full+strings.Replace(wantsGPU, "count=2", "count=1", 1)+"-- preempt --\non\n")
	if len(x.Preempts) != 1 {
		t.Fatalf("preempts %+v", x.Preempts)
	}
	v := x.Preempts[0]
	if v.AllocID != "a2" || v.LostSeconds != 600 || v.Checkpoint == nil || v.Checkpoint.Step != 7 || v.Milli != 1000 || v.For != "train.g[0]" || v.Priority != 20 {
		t.Errorf("the cheapest is a2, which lost 10 minutes: %+v", v)
	}
	if s := x.Groups[0].Places; len(s) != 1 || !s[0].Claim || s[0].Awaits != 0 && s[0].Awaits != 1 {
		t.Errorf("places %+v", s)
	}
}

// TestExplainStart: now, at a declared end, never.
func TestExplainStart(t *testing.T) {
	_, x := explainText(t, full+wantsGPU, func(w *world) { w.versions[0].TaskGroups[0].MaxRunDuration = 4 * time.Hour })
	s := x.Groups[0].Start
	if want := epoch.Add(time.Hour); s.At < want || s.At > want.Add(time.Minute) || len(s.Because) != 1 || s.Because[0].JobID != "low" {
		t.Errorf("a3 ends in an hour: %+v", s)
	}
	_, x = explainText(t, full+strings.Replace(wantsGPU, "device nvidia/gpu", "device nvidia/gpu count=2", 1))
	if s := x.Groups[0].Start; s.Never || s.At != 0 || s.Now {
		t.Errorf("two GPUs of one node may come free some day: %+v", s)
	}
	_, x = explainText(t, full+strings.Replace(wantsGPU, "task t", "task t memory=9000", 1))
	if s, g := x.Groups[0].Start, x.Groups[0]; !s.Never || len(g.Shortages) != 2 || g.Shortages[0].Nodes != 2 {
		t.Errorf("no node has so much memory, and GPUs are short too: %+v, %+v", s, g.Shortages)
	}
	_, x = explainText(t, full+strings.Replace(wantsGPU, "device nvidia/gpu", "", 1))
	g := x.Groups[0]
	if g.Queued != 0 || len(g.Places) != 2 || !g.Start.Now || g.Nodes != nil || g.Failure != nil || len(g.Places[0].Scores) == 0 {
		t.Errorf("work without GPUs has room: %+v", g)
	}
}

// TestExplainUnfit names the devices that are out of use.
func TestExplainUnfit(t *testing.T) {
	text := strings.Replace(full+wantsGPU, "n4\n", "n4 gpu=A100 gpus=2 cordoned=n4-gpu0 sick=n4-gpu1 because=XID79\n", 1)
	_, x := explainText(t, text)
	u := x.Groups[0].Unfit
	if len(u) != 2 || u[0].DeviceID != "n4-gpu0" || u[0].Order != cluster.DeviceCordon || u[1].Why != "XID79" || u[1].Order != "" {
		t.Errorf("%+v", u)
	}
}

// TestExplainRuns: of what runs it says where and since when.
func TestExplainRuns(t *testing.T) {
	text := strings.Replace(full, " draining", "", 1) + "a5 train.g[0] on n3 up=30m\n" + wantsGPU
	_, x := explainText(t, text)
	g := x.Groups[0]
	if g.Running != 1 || len(g.Runs) != 1 || g.Runs[0].NodeID != "n3" || g.Runs[0].Since != epoch.Add(-30*time.Minute) || g.Queued != 0 || len(g.Places) != 1 {
		t.Errorf("%+v", g)
	}
	if d := g.Places[0].Devices; g.Places[0].NodeID != "n3" || len(d) != 1 || d[0].ID != "n3-gpu1" || d[0].Ordinal != 1 {
		t.Errorf("%+v", g.Places[0])
	}
}

// TestExplainReservation: what is free but kept for who is first in line is told of as his, from when.
func TestExplainReservation(t *testing.T) {
	_, e := explainText(t, `
-- nodes --
n1 gpu=A100 gpus=2
-- others --
job first type=batch priority=70
group g count=1 gang
task t
device nvidia/gpu count=2
job done type=batch
group g count=9 limit=2h
task t kill_timeout=10s
device nvidia/gpu
-- job --
job next type=batch priority=50
group g limit=61m
task t kill_timeout=10s
device nvidia/gpu
-- running --
a done.g[0] on n1 up=1h
-- waiting --
first
`)
	if len(e.Groups) != 1 || len(e.Groups[0].Holders) != 2 {
		t.Fatalf("%+v", e.Groups)
	}
	h := e.Groups[0].Holders
	i := slices.IndexFunc(h, func(h *cluster.Holder) bool { return h.Reserved })
	if i < 0 || h[i].JobID != "first" || h[i].Claim || h[i].Milli != 1000 || h[i].Since != epoch.Add(time.Hour+10*time.Second) || h[1-i].JobID != "done" || h[1-i].Reserved {
		t.Errorf("%+v and %+v", h[0], h[1])
	}
}
