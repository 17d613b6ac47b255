package place

import (
	"fmt"

	"github.com/rxvision/rxvision/cluster"
)

// DescParallel describes the evaluation of a child that waits for others.
const DescParallel = "waits for other children of job %q: %d of at most %d run (" + cluster.MetaMaxParallel + ")"

// tenants is what placements of this view change of what namespaces hold.
type tenants struct {
	usage      map[string]*cluster.Usage     // of namespaces in which something was placed
	allowances map[string]*cluster.Allowance // nil: no quota
	begun      map[cluster.JobKey]int        // children by their parent
	borrowed   map[string][]cluster.Borrowed // by the namespaces in the view's state
}

func (v *View) usageOf(namespace string) *cluster.Usage {
	if u := v.tenants.usage[namespace]; u != nil {
		return u
	}
	return v.reader.Usage(nil, namespace)
}

// allowance is what a namespace may hold, nil when no quota limits it.
func (v *View) allowance(namespace string) *cluster.Allowance {
	a, known := v.tenants.allowances[namespace]
	if !known {
		a = v.reader.Allowance(namespace, v.usageOf)
		v.tenants.allowances[namespace] = a
	}
	return a
}

// excess is why a quota leaves no room.
type excess struct {
	allowance *cluster.Allowance
	by        *cluster.Usage // what was to be held
	reasons   []string
}

// excess says why the job may not hold so much more, nil when it may.
func (p *planner) excess(by *cluster.Usage) *excess {
	a := p.allowance(p.job.Namespace)
	if reasons := a.Exceeded(by); reasons != nil {
		return &excess{a, by, reasons}
	}
	return nil
}

// charge counts a placement of the job in (by 1) or out (by -1) of its namespace's usage.
func (p *planner) charge(placed *cluster.Allocation, times int64) {
	v, a := p.View, p.allowance(p.job.Namespace)
	if a == nil {
		return // no quota, and no cohort
	}
	by := cluster.NewUsage(p.job.Namespace, placed.AllocatedResources, p.job.Preemptible())
	u := v.usageOf(by.Namespace).Clone()
	u.Add(by, times)
	v.tenants.usage[by.Namespace] = u
	if a.Shared {
		clear(v.tenants.allowances) // of others too
	} else {
		delete(v.tenants.allowances, by.Namespace)
	}
}

// asks is what an allocation of the group holds at least: of which kind its devices are is known when a node is.
func asks(job *cluster.Job, g *cluster.TaskGroup) *cluster.Usage {
	res := &cluster.AllocatedResources{Tasks: map[string]*cluster.AllocatedTaskResources{}}
	for _, t := range g.Tasks {
		if t.Resources == nil {
			continue
		}
		r := &cluster.AllocatedTaskResources{}
		r.Cpu.CpuShares, r.Memory.MemoryMB = int64(t.Resources.CPU), int64(t.Resources.MemoryMB)
		for _, a := range deviceAsks(t) {
			d := cluster.DeviceNamed(a.name)
			if a.shared() && a.milli == 0 {
				continue // how much of a device the memory is depends on the device
			}
			d.Milli, d.MiB = a.milli, a.mib
			if !a.shared() {
				d.DeviceIDs = make([]string, a.count)
			}
			r.Devices = append(r.Devices, d)
		}
		res.Tasks[t.Name] = r
	}
	return cluster.NewUsage(job.Namespace, res, job.Preemptible())
}

// holdBack notes that the quota leaves no room for a want. What it would have replaced stays, unless the quota has
// room without it: then it is stopped first and the want waits until it has ended.
func (p *planner) holdBack(g *group, nodes *search, w want, e *excess) {
	p.result.Queued[g.name]++
	if w.prev != nil && !w.prev.ClientTerminal() {
		was := p.reader.JobVersion(nil, w.prev.JobKey(), w.prev.JobVersion)
		less := e.by.Clone()
		less.Add(cluster.NewUsage(less.Namespace, w.prev.AllocatedResources, was != nil && was.Preemptible()), -1)
		if e.allowance.Exceeded(less) == nil {
			p.deferred = true
			if w.stop != "" {
				p.left -= stopBytes
				p.order(w.prev, stopOf(w.prev, w.stop))
			}
			return
		}
	}
	if w.stop != "" {
		p.vacate(w.prev, 1)
	}
	p.quota = e.allowance.Quota
	if first := p.result.Failed[g.name]; first != nil {
		first.CoalescedFailures++
		return
	}
	metric := nodes.metric
	metric.QuotaExhausted = e.reasons
	p.result.Failed[g.name] = &metric
}

// mayBegin says why the children that run of the job's parent keep it waiting, "" when they do not.
func (p *planner) mayBegin() string {
	if p.job == nil || p.job.Stop {
		return ""
	}
	limit, running := p.reader.ParallelChildren(p.job)
	parent := cluster.JobKey{Namespace: p.job.Namespace, ID: p.job.ParentID}
	if running += p.tenants.begun[parent]; limit == 0 || running < limit {
		return ""
	}
	return fmt.Sprintf(DescParallel, parent.ID, running, limit)
}

// lacks says whether something of the job is still to be placed.
func (p *planner) lacks() bool {
	for _, n := range p.result.Queued {
		if n > 0 {
			return true
		}
	}
	return false
}

// begins counts a child that the plan places something of.
func (p *planner) begins() {
	if p.job == nil || len(p.result.Plan.Place)+len(p.result.Earlier) == 0 {
		return
	}
	if limit, _ := p.reader.ParallelChildren(p.job); limit > 0 {
		p.tenants.begun[cluster.JobKey{Namespace: p.job.Namespace, ID: p.job.ParentID}]++
	}
}

func (v *View) borrowed(namespace string) []cluster.Borrowed {
	b, known := v.tenants.borrowed[namespace]
	if !known {
		b = v.reader.Borrowed(namespace)
		v.tenants.borrowed[namespace] = b
	}
	return b
}

// owed says whether the job's namespace shares with others and would borrow nothing with n more of a group beside all
// that it has claims on: it may take back what is borrowed from work of its own priority that says rx_preemptible.
// Were it to borrow thereby, that could be taken back from it at once, and so on without end.
func (p *planner) owed(g *group, n int) bool {
	a := p.allowance(p.job.Namespace)
	return a != nil && a.Shared && a.Own(p.claimed(g, n))
}

// excessOfClaims says why the job may not hold n more of a group beside all that it has claims
// on, nil when it may.
func (p *planner) excessOfClaims(g *group, n int) *excess {
	return p.excess(p.claimed(g, n))
}

// claimed is what n more of a group would hold beside all that the job has claims on.
func (p *planner) claimed(g *group, n int) *cluster.Usage {
	by := g.ask.Clone()
	by.Add(g.ask, int64(n-1))
	for _, c := range p.claims {
		by.Add(cluster.NewUsage(p.job.Namespace, c.Resources, p.job.Preemptible()), 1)
	}
	return by
}
