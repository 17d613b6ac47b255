package scheduler

import (
	"cmp"
	"container/heap"
	"math"
	"strings"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// Within one priority the namespace with the smallest share goes first. Its share is the dominant one: of CPU,
// memory and each kind of device, that of which it has the greatest part of the region. What it holds now counts,
// and what it has held, as an average in which a moment counts half as much for each half-life that has passed.
// Nothing of it is kept: a new leader takes for what was held what is held when it begins.
//
// This is order, not a bound; floats do, since nothing of it enters the log.
const (
	fairHalfLife = 6 * time.Hour
	fairTick     = time.Second // between two looks at the clock
	fairForgets  = 1e-6        // a smaller share of the past is none
)

// fair is what the queue knows of the shares of namespaces.
type fair struct {
	tenants  map[string]*tenant
	capacity map[string]float64 // of the region, by resource
	nodes    any                // the version that it was added up of
	usage    any                // the version that tenants hold
	ticked   cluster.Time
	job      func(cluster.JobKey) *cluster.Job // of the last look
}

// tenant is one namespace.
type tenant struct {
	name    string
	usage   *cluster.Usage     // that held was made of
	held    map[string]float64 // now, by resource, as parts of the region's
	past    map[string]float64 // the average of what was held
	out     float64            // for evaluations that workers have: what would be held if all of them were placed
	settled float64            // of it, for those that were given back since the last look: the next one finds what became of them
	share   float64            // the dominant one, out included
	classes map[rank]*class
}

func (f *fair) tenant(name string) *tenant {
	t := f.tenants[name]
	if t == nil {
		t = &tenant{name: name, past: map[string]float64{}, classes: map[rank]*class{}}
		f.tenants[name] = t
	}
	return t
}

func (r rank) compare(o rank) int {
	if r.priority != o.priority {
		return cmp.Compare(o.priority, r.priority)
	}
	switch {
	case r.replaces == o.replaces:
		return 0
	case r.replaces:
		return -1
	}
	return 1
}

func (c *class) goesBefore(o *class) bool {
	if order := c.rank.compare(o.rank); order != 0 {
		return order < 0
	}
	if c.tenant.share != o.tenant.share {
		return c.tenant.share < o.tenant.share
	}
	return before(c.head(), o.head()) < 0
}

// weigh takes over what namespaces hold. It costs what has changed, and once in fairTick a look at all namespaces.
func (q *queue) weigh(snap *cluster.Snapshot, now cluster.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	f := &q.fair
	f.job = func(k cluster.JobKey) *cluster.Job { return snap.Job(nil, k) }
	first := f.ticked == 0
	all := first || len(f.capacity) == 0 || now >= f.ticked.Add(fairTick) // of a region without nodes there are no shares
	if all {
		f.age(snap, now)
	}
	changed := map[*tenant]bool{}
	if v := snap.UsageVersion(); all || v != f.usage {
		f.usage = v
		f.follow(snap, all, changed)
	}
	for _, t := range f.tenants {
		if first {
			for r, x := range t.held {
				t.past[r] = x
			}
		}
		if t.settled != 0 {
			t.out = max(0, t.out-t.settled)
			t.settled = 0
			changed[t] = true
		}
		if all || changed[t] {
			t.weigh()
		}
		if all && t.idle() {
			delete(f.tenants, t.name)
		}
	}
	if all || len(changed) > 1 {
		heap.Init(&q.ready)
		return
	}
	for t := range changed {
		q.reorder(t)
	}
}

// age lets time pass for the past, and looks how big the region is.
func (f *fair) age(snap *cluster.Snapshot, now cluster.Time) {
	if v := snap.NodesVersion(); v != f.nodes {
		f.nodes, f.capacity = v, capacityOf(snap.Nodes(nil, ""))
	}
	if f.ticked != 0 {
		keeps := math.Exp2(-float64(now-f.ticked) / float64(fairHalfLife))
		for _, t := range f.tenants {
			for r, x := range t.past {
				if t.past[r] = x * keeps; t.past[r] < fairForgets {
					delete(t.past, r)
				}
			}
			for r, x := range t.held {
				t.past[r] += x * (1 - keeps)
			}
		}
	}
	f.ticked = now
}

// follow takes over the usage of namespaces, of all or of those where it has changed.
func (f *fair) follow(snap *cluster.Snapshot, all bool, changed map[*tenant]bool) {
	seen := 0
	for _, u := range snap.Usages(nil) {
		t := f.tenant(u.Namespace)
		seen++
		if t.usage != u || all {
			t.usage, t.held = u, f.parts(&u.Total)
			changed[t] = true
		}
	}
	held := 0
	for _, t := range f.tenants {
		if t.usage != nil {
			held++
		}
	}
	if held == seen {
		return
	}
	for _, t := range f.tenants {
		if t.usage != nil && snap.Usage(nil, t.name).Allocs == 0 {
			t.usage, t.held = nil, nil
			changed[t] = true
		}
	}
}

// parts gives amounts as parts of the region's.
func (f *fair) parts(a *cluster.Amounts) map[string]float64 {
	out := map[string]float64{}
	add := func(r string, n int64) {
		if all := f.capacity[r]; n > 0 && all > 0 {
			out[r] += float64(n) / all
		}
	}
	add("cpu", a.CPU)
	add("memory", a.MemoryMB)
	for _, d := range a.Devices {
		add(d.Vendor+"/"+d.Type, d.Milli)
	}
	return out
}

// capacityOf adds up what nodes have, whether they can be used now or not: shares must not jump with each of them.
func capacityOf(nodes []*cluster.Node) map[string]float64 {
	c := map[string]float64{}
	for _, n := range nodes {
		cpu, memory, _ := n.Available()
		c["cpu"] += float64(cpu)
		c["memory"] += float64(memory)
		if n.NodeResources == nil {
			continue
		}
		for _, g := range n.NodeResources.Devices {
			c[g.Vendor+"/"+g.Type] += float64(len(g.Instances)) * cluster.WholeMilli
		}
	}
	return c
}

func (t *tenant) weigh() {
	t.share = 0
	for r, x := range t.past {
		t.share = max(t.share, x+t.held[r])
	}
	for r, x := range t.held {
		t.share = max(t.share, x+t.past[r])
	}
	t.share += t.out
}

func (t *tenant) idle() bool {
	return t.usage == nil && t.out == 0 && len(t.past) == 0 && len(t.classes) == 0
}

// reorder brings a namespace to its place after its share has changed.
func (q *queue) reorder(t *tenant) {
	for _, c := range t.classes { // in whatever order: each fix is right given the others
		heap.Fix(&q.ready, c.at)
	}
}

// charge counts an evaluation that a worker takes, so that one namespace does not get a whole batch.
func (q *queue) charge(i *item) {
	t := q.fair.tenant(i.eval.Namespace)
	i.cost = q.fair.cost(i.eval)
	t.out += i.cost
	t.weigh()
	q.reorder(t)
}

// cost is the dominant share of all that an evaluation's job may get by it.
func (f *fair) cost(e *cluster.Evaluation) (most float64) {
	if f.job == nil {
		return 0
	}
	j := f.job(e.JobKey())
	if j == nil || j.Stop {
		return 0
	}
	var a cluster.Amounts
	kinds := map[string]float64{}
	for _, g := range j.TaskGroups {
		n, known := e.QueuedAllocations[g.Name]
		if !known {
			n = g.Count
		}
		for _, task := range g.Tasks {
			if task.Resources == nil {
				continue
			}
			a.CPU += int64(n * task.Resources.CPU)
			a.MemoryMB += int64(n * task.Resources.MemoryMB)
			for _, d := range task.Resources.Devices {
				name, milli, mib := d.Share()
				if milli == 0 && mib == 0 {
					milli = int64(d.Count) * cluster.WholeMilli
				}
				kinds[f.kind(name)] += float64(int64(n) * milli)
			}
		}
	}
	for _, x := range f.parts(&a) {
		most = max(most, x)
	}
	for kind, x := range kinds {
		if all := f.capacity[kind]; all > 0 {
			most = max(most, x/all)
		}
	}
	return most
}

// kind is the resource that a request's device, TYPE, VENDOR/TYPE or VENDOR/TYPE/NAME, is one of.
func (f *fair) kind(name string) string {
	parts := strings.SplitN(name, "/", 3)
	if len(parts) > 1 {
		return parts[0] + "/" + parts[1]
	}
	found := ""
	for r := range f.capacity { // the first by name, so that it is always the same
		if _, t, ok := strings.Cut(r, "/"); ok && t == name && (found == "" || r < found) {
			found = r
		}
	}
	return found
}
