package cluster

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// tableUsage holds a Usage of each namespace of which anything is held. It follows from the allocations:
// snapshots do not have it, and a restore adds it up anew.
const tableUsage = "usage"

var usageTable = &Table{
	Name: tableUsage, New: func() any { return new(Usage) },
	key: func(v any) string { return v.(*Usage).Namespace },
}

// Amounts adds up resources that are held.
type Amounts struct {
	CPU         int64 // MHz
	MemoryMB    int64
	MemoryMaxMB int64 // MemoryMB where a task may not go beyond it
	Devices     []DeviceAmount
}

// DeviceAmount is how much is held of the devices of one kind, in thousandths of devices and MiB of their
// memory, as QuotaDevice counts them.
type DeviceAmount struct {
	Vendor, Type, Name string
	Milli, MiB         int64
}

// Usage is what the allocations of a namespace hold: until their nodes report their end, whatever the servers want.
type Usage struct {
	Namespace string
	Allocs    int64
	Total     Amounts
	Firm      Amounts // of it, what may not be preempted
}

// NewUsage is what one allocation with such resources adds to its namespace's usage.
func NewUsage(namespace string, res *AllocatedResources, preemptible bool) *Usage {
	u := &Usage{Namespace: namespace}
	u.count(res, preemptible, 1)
	return u
}

// Add counts another usage in (by 1) or out (by -1).
func (u *Usage) Add(o *Usage, by int64) {
	u.Allocs += by * o.Allocs
	u.Total.add(&o.Total, by)
	u.Firm.add(&o.Firm, by)
}

// Clone gives a copy that may be changed.
func (u *Usage) Clone() *Usage {
	c := *u
	c.Total.Devices, c.Firm.Devices = slices.Clone(u.Total.Devices), slices.Clone(u.Firm.Devices)
	return &c
}

func (u *Usage) equal(o *Usage) bool {
	return u.Namespace == o.Namespace && u.Allocs == o.Allocs && u.Total.equal(&o.Total) && u.Firm.equal(&o.Firm)
}

func (u *Usage) count(res *AllocatedResources, preemptible bool, by int64) {
	u.Allocs += by
	u.Total.count(res, by)
	if !preemptible {
		u.Firm.count(res, by)
	}
}

func (a *Amounts) equal(o *Amounts) bool {
	return a.CPU == o.CPU && a.MemoryMB == o.MemoryMB && a.MemoryMaxMB == o.MemoryMaxMB && slices.Equal(a.Devices, o.Devices)
}

func (a *Amounts) add(o *Amounts, by int64) {
	a.CPU += by * o.CPU
	a.MemoryMB += by * o.MemoryMB
	a.MemoryMaxMB += by * o.MemoryMaxMB
	for _, d := range o.Devices {
		d.Milli, d.MiB = by*d.Milli, by*d.MiB
		a.addDevice(d)
	}
}

// addDevice keeps the devices in order, and none of which nothing is held.
func (a *Amounts) addDevice(d DeviceAmount) {
	i, there := slices.BinarySearchFunc(a.Devices, d, func(x, y DeviceAmount) int {
		for _, c := range [...]int{strings.Compare(x.Vendor, y.Vendor), strings.Compare(x.Type, y.Type)} {
			if c != 0 {
				return c
			}
		}
		return strings.Compare(x.Name, y.Name)
	})
	if !there {
		a.Devices = slices.Insert(a.Devices, i, d)
	} else {
		a.Devices[i].Milli += d.Milli
		a.Devices[i].MiB += d.MiB
	}
	if a.Devices[i].Milli == 0 && a.Devices[i].MiB == 0 {
		a.Devices = slices.Delete(a.Devices, i, i+1)
	}
}

func (a *Amounts) count(res *AllocatedResources, by int64) {
	if res == nil {
		return
	}
	for _, t := range res.Tasks {
		a.CPU += by * t.Cpu.CpuShares
		a.MemoryMB += by * t.Memory.MemoryMB
		a.MemoryMaxMB += by * max(t.Memory.MemoryMB, t.Memory.MemoryMaxMB)
		for _, d := range t.Devices {
			milli, mib := d.amount()
			a.addDevice(DeviceAmount{d.Vendor, d.Type, d.Name, by * milli, by * mib})
		}
	}
}

// amount is what of devices is held, in thousandths and MiB, as QuotaDevice counts it. A share of a device whose
// memory is not known (it was given before that was noted) is taken for all of it where it says no thousandths.
func (d *AllocatedDevice) amount() (milli, mib int64) {
	switch {
	case !d.Shared():
		n := int64(len(d.DeviceIDs))
		return n * WholeMilli, n * d.MemoryMiB
	case d.MemoryMiB > 0:
		return max(d.Milli, (d.MiB*WholeMilli+d.MemoryMiB-1)/d.MemoryMiB), d.MiB
	case d.Milli > 0:
		return d.Milli, d.MiB
	}
	return WholeMilli, d.MiB
}

// DeviceNamed is an amount of devices of which no more is known than a request's name: TYPE, VENDOR/TYPE or
// VENDOR/TYPE/NAME.
func DeviceNamed(name string) *AllocatedDevice {
	parts := strings.SplitN(name, "/", 3)
	switch len(parts) {
	case 1:
		return &AllocatedDevice{Type: parts[0]}
	case 2:
		return &AllocatedDevice{Vendor: parts[0], Type: parts[1]}
	}
	return &AllocatedDevice{Vendor: parts[0], Type: parts[1], Name: parts[2]}
}

// dimension is one of the things that a quota limits.
type dimension struct {
	name string // cpu, memory, memory_max; or TYPE, VENDOR/TYPE or VENDOR/TYPE/NAME of devices
	unit unit
}

type unit int

const (
	unitPlain unit = iota // not of devices: MHz or MiB
	unitMilli             // thousandths of devices
	unitMiB               // of devices' memory
)

// deviceDimension is what a limit on a device is about.
func deviceDimension(name string) dimension {
	base, _, mib := (&RequestedDevice{Name: name, Count: 1}).Share()
	if mib > 0 {
		return dimension{base, unitMiB}
	}
	return dimension{base, unitMilli}
}

// of is how much of the dimension is among the amounts.
func (d dimension) of(a *Amounts) (n int64) {
	switch d {
	case dimension{name: "cpu"}:
		return a.CPU
	case dimension{name: "memory"}:
		return a.MemoryMB
	case dimension{name: "memory_max"}:
		return a.MemoryMaxMB
	}
	for i := range a.Devices {
		x := &a.Devices[i]
		switch {
		case !x.named(d.name):
		case d.unit == unitMiB:
			n += x.MiB
		default:
			n += x.Milli
		}
	}
	return n
}

// named says whether a name, TYPE, VENDOR/TYPE or VENDOR/TYPE/NAME, means these devices.
func (x *DeviceAmount) named(name string) bool {
	vendor, rest, ok := strings.Cut(name, "/")
	if !ok {
		return x.Type == vendor
	}
	kind, model, ok := strings.Cut(rest, "/")
	return x.Vendor == vendor && x.Type == kind && (!ok || x.Name == model)
}

// bound is one limit of a quota: of which dimension how much, and how the quota counts it.
type bound struct {
	dimension
	label string // as the quota says it
	most  int64
	whole bool // in devices
}

// text writes an amount as the quota counts it.
func (b *bound) text(n int64) string {
	if !b.whole {
		return strconv.FormatInt(n, 10)
	}
	s := strconv.FormatInt(n/WholeMilli, 10)
	if rest := n % WholeMilli; rest != 0 {
		s += strings.TrimRight(fmt.Sprintf(".%03d", rest), "0")
	}
	return s
}

// bounds lists what a quota limits.
func (q *Quota) bounds() (out []bound) {
	if q == nil {
		return nil
	}
	for _, l := range q.Limits {
		for _, x := range []struct {
			name  string
			limit *int64
		}{{"cpu", l.CPU}, {"memory", l.MemoryMB}, {"memory_max", l.MemoryMaxMB}} {
			if x.limit != nil && *x.limit != 0 {
				out = append(out, bound{dimension: dimension{name: x.name}, label: x.name, most: max(0, *x.limit)})
			}
		}
		for _, d := range l.Devices {
			b := bound{dimension: deviceDimension(d.Name), label: d.Name, most: d.Count}
			if b.whole = b.unit == unitMilli && b.name == d.Name; b.whole {
				b.most *= WholeMilli
			}
			out = append(out, b)
		}
	}
	return out
}

// Usage gives what the allocations of a namespace hold; it is never nil.
func (s *Snapshot) Usage(ws WatchSet, namespace string) *Usage {
	if u := first[Usage](s.txn, ws, tableUsage, "id", namespace); u != nil {
		return u
	}
	return &Usage{Namespace: namespace}
}

// Usages gives the usage of all namespaces of which anything is held, by name.
func (s *Snapshot) Usages(ws WatchSet) []*Usage {
	return list[Usage](s.txn, ws, tableUsage, "id_prefix", "")
}

// UsageVersion stands for all usage: equal values, of whatever snapshots, mean that it is the same.
func (s *Snapshot) UsageVersion() any { return s.txn.rows[usageTable.number] }

// Allowance is what a namespace may hold by its quota, and what it holds.
type Allowance struct {
	Quota  string
	Shared bool // other namespaces' usage bears on it
	lines  []allowed
}

type allowed struct {
	bound
	ceiling    int64 // of all work: most, and what may be borrowed
	used, firm int64
}

// Allowance gives a namespace's, nil for one without a quota. usage gives the usage of a namespace; nil: that
// of the snapshot.
//
// Within a cohort a namespace may hold more than its quota: at most rx_borrow_percent of it, of what the other
// members leave of theirs, each at most rx_lend_percent of it, less what they have borrowed. Work that may not be
// preempted stays within the quota, and within it nobody is kept from anything by what others have borrowed: that
// is to be taken back from them.
func (s *Snapshot) Allowance(namespace string, usage func(namespace string) *Usage) *Allowance {
	n := s.Namespace(nil, namespace)
	if n == nil || n.Quota == "" {
		return nil
	}
	if usage == nil {
		usage = func(namespace string) *Usage { return s.Usage(nil, namespace) }
	}
	a := &Allowance{Quota: n.Quota}
	for _, b := range s.Quota(nil, n.Quota).bounds() {
		a.lines = append(a.lines, allowed{bound: b, ceiling: b.most})
	}
	sharing := s.QuotaNamespaces(nil, n.Quota)
	for _, other := range sharing {
		u := usage(other.Name)
		for i := range a.lines {
			l := &a.lines[i]
			l.used, l.firm = l.used+l.of(&u.Total), l.firm+l.of(&u.Firm)
		}
	}
	a.Shared = len(sharing) > 1
	if n.Cohort() == "" {
		return a
	}
	a.Shared = true
	idle := make([]int64, len(a.lines)) // what others lend, less what they have borrowed
	for _, m := range list[Namespace](s.txn, nil, TableNamespaces, "cohort", n.Cohort()) {
		if m.Name == n.Name {
			continue
		}
		held, lends := &usage(m.Name).Total, m.percent(MetaLendPercent, 100)
		for _, b := range s.Quota(nil, m.Quota).bounds() {
			i := slices.IndexFunc(a.lines, func(l allowed) bool { return l.dimension == b.dimension })
			if i < 0 {
				continue
			}
			if left := b.most - b.of(held); left < 0 {
				idle[i] += left
			} else {
				idle[i] += min(left, share(b.most, lends))
			}
		}
	}
	for i := range a.lines {
		l := &a.lines[i]
		if borrows := n.percent(MetaBorrowPercent, -1); borrows >= 0 {
			idle[i] = min(idle[i], share(l.most, borrows))
		}
		l.ceiling += max(0, idle[i])
	}
	return a
}

// share is a percentage of an amount.
func share(n, percent int64) int64 { return n/100*percent + n%100*percent/100 }

// Exceeded says in upstream's words which limits more usage would break, nil for none. Nothing is said of a
// dimension of which no more is asked for.
func (a *Allowance) Exceeded(by *Usage) (reasons []string) {
	if a == nil {
		return nil
	}
	for i := range a.lines {
		l := &a.lines[i]
		more, firm := l.of(&by.Total), l.of(&by.Firm)
		switch {
		case firm > 0 && l.firm+firm > l.most && l.ceiling > l.most:
			reasons = append(reasons, fmt.Sprintf("%s exhausted (%s needed > %s limit of work that may not be preempted)", l.label, l.text(l.firm+firm), l.text(l.most)))
		case firm > 0 && l.firm+firm > l.most, more > 0 && l.used+more > l.ceiling:
			reasons = append(reasons, fmt.Sprintf("%s exhausted (%s needed > %s limit)", l.label, l.text(l.used+more), l.text(l.ceiling)))
		}
	}
	return reasons
}

// Own says whether no more would be held with that than the quota itself allows: whether nothing of it would be borrowed.
func (a *Allowance) Own(by *Usage) bool {
	for i := range a.lines {
		if l := &a.lines[i]; l.used+l.of(&by.Total) > l.most {
			return false
		}
	}
	return true
}

// Take counts usage in.
func (a *Allowance) Take(by *Usage) {
	for i := range a.lines {
		l := &a.lines[i]
		l.used, l.firm = l.used+l.of(&by.Total), l.firm+l.of(&by.Firm)
	}
}

// Held is how much of what the limit is about is among the amounts, as it counts: whole devices are rounded up.
func (d *QuotaDevice) Held(a *Amounts) int64 {
	dim := deviceDimension(d.Name)
	n := dim.of(a)
	if dim.unit == unitMilli && dim.name == d.Name {
		n = (n + WholeMilli - 1) / WholeMilli
	}
	return n
}

// Borrowed is what a namespace holds of one dimension beyond its quota, in MHz, MiB or thousandths of devices.
type Borrowed struct {
	Name   string // of the limit, as the quota says it
	Amount int64  // above 0
	of     dimension
}

// Of says how much of the dimension an allocation's resources are: so much less is borrowed when it ends.
func (b Borrowed) Of(res *AllocatedResources) int64 {
	var a Amounts
	a.count(res, 1)
	return b.of.of(&a)
}

// Borrowed says how much a namespace holds beyond its quota: what members of its cohort have lent to it, or what
// it has kept since its quota became lower. nil: nothing. It is what others may have back; work that may be
// preempted is there for it, since other work does not borrow.
func (s *Snapshot) Borrowed(namespace string) []Borrowed {
	return s.Allowance(namespace, nil).Borrowed()
}

// Borrowed is what is held beyond the quota; nil: nothing.
func (a *Allowance) Borrowed() (out []Borrowed) {
	if a == nil {
		return nil
	}
	for _, l := range a.lines {
		if l.used > l.most {
			out = append(out, Borrowed{l.label, l.used - l.most, l.dimension})
		}
	}
	return out
}

// QuotaHeld gives what the namespaces that name a quota hold together of all that it limits; nil for a quota that
// is not there.
func (s *Snapshot) QuotaHeld(ws WatchSet, quota string) (*Quota, *Usage) {
	q := s.Quota(ws, quota)
	if q == nil {
		return nil, nil
	}
	sum := &Usage{}
	for _, n := range s.QuotaNamespaces(ws, quota) {
		sum.Add(s.Usage(ws, n.Name), 1)
	}
	return q, sum
}

// usageOf is a namespace's usage within a command, to be changed; it is written when the command was applied.
func (t *tx) usageOf(namespace string) *Usage {
	u := t.usage[namespace]
	if u == nil {
		u = t.Usage(nil, namespace).Clone()
		if t.usage == nil {
			t.usage = map[string]*Usage{}
		}
		t.usage[namespace] = u
	}
	return u
}

// charge keeps usage in step with a change of an allocation.
func (t *tx) charge(of *Table, old, now any) {
	if of.Name != TableAllocs {
		return
	}
	was, _ := old.(*Allocation)
	is, _ := now.(*Allocation)
	held, holds := was != nil && was.Occupies(), is != nil && is.Occupies()
	if held && holds && was.AllocatedResources == is.AllocatedResources && was.JobVersion == is.JobVersion {
		return
	}
	if held {
		t.usageOf(was.Namespace).count(was.AllocatedResources, t.preemptible(was), -1)
	}
	if holds {
		t.usageOf(is.Namespace).count(is.AllocatedResources, t.preemptible(is), 1)
	}
}

// preemptible says whether an allocation may be preempted, as the version of its job that it runs says.
func (s *Snapshot) preemptible(a *Allocation) bool {
	j := s.JobVersion(nil, a.JobKey(), a.JobVersion)
	return j != nil && j.Preemptible()
}

// writeUsage puts the changed usage into the state.
func (t *tx) writeUsage() {
	for _, name := range sortedKeys(t.usage) {
		u := t.usage[name]
		old := first[Usage](t.txn, nil, tableUsage, "id", name)
		switch {
		case old == nil && u.Allocs == 0, old != nil && old.equal(u):
			continue
		case u.Allocs == 0:
			t.batch.rows(usageTable).delete(t.batch.edit, usageTable, name)
			t.batch.changes = append(t.batch.changes, change{usageTable, name, old, nil})
		default:
			c := change{table: usageTable, key: name, new: u}
			if old != nil {
				c.old = old
			}
			t.batch.rows(usageTable).put(t.batch.edit, usageTable, name, u)
			t.batch.changes = append(t.batch.changes, c)
		}
	}
	t.usage = nil
}

// addUpUsage gives the usage of all namespaces by their allocations.
func (s *Snapshot) addUpUsage() map[string]*Usage {
	all := map[string]*Usage{}
	var of JobKey
	var version uint64
	var known, preemptible bool
	each(s.txn, func(a *Allocation) bool {
		if !a.Occupies() {
			return true
		}
		if k := a.JobKey(); !known || k != of || a.JobVersion != version {
			known, of, version, preemptible = true, k, a.JobVersion, s.preemptible(a)
		}
		u := all[a.Namespace]
		if u == nil {
			u = &Usage{Namespace: a.Namespace}
			all[a.Namespace] = u
		}
		u.count(a.AllocatedResources, preemptible, 1)
		return true
	}, TableAllocs, "job_prefix", "")
	return all
}

// checkUsage compares what is remembered of usage with what the allocations add up to.
func (s *Snapshot) checkUsage(fault func(string, ...any)) {
	all := s.addUpUsage()
	for _, said := range s.Usages(nil) {
		is := all[said.Namespace]
		if delete(all, said.Namespace); is == nil || !said.equal(is) {
			fault("namespace %s: usage says %+v, allocations say %+v", said.Namespace, said, is)
		}
	}
	for _, name := range sortedKeys(all) {
		fault("namespace %s: its usage %+v is not known", name, all[name])
	}
}
