package cluster

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Namespaces are the region's tenants. A quota bounds what the allocations of the namespaces that
// name it hold together; a cohort lets a namespace use what of their quotas others leave idle.
//
// https://developer.hashicorp.com/nomad/docs/other-specifications/namespace
// https://developer.hashicorp.com/nomad/docs/other-specifications/quota

// Tables of tenants.
const (
	TableNamespaces = "namespaces"
	TableQuotas     = "quotas"
)

// Bounds of tenants.
const (
	MaxNamespaces   = 10_000
	MaxQuotas       = 10_000
	MaxDescription  = 256      // of a namespace or a quota, in bytes
	MaxTenantMeta   = 16 << 10 // of a namespace: keys and values, in bytes
	MaxQuotaDevices = 64       // limits on devices of one quota
	maxTenantList   = 256      // drivers or node pools in a list of a namespace

	// MaxDeadJobs bounds the dead jobs that are forgotten together with their namespace.
	MaxDeadJobs = 10_000
)

// Keys of a namespace's meta that speak to rxvision.
const (
	MetaCohort        = "rx_cohort"         // the group of namespaces that lend each other what they do not use of their quotas
	MetaBorrowPercent = "rx_borrow_percent" // how far beyond its quota it may go, in percent of it; without: as far as others lend
	MetaLendPercent   = "rx_lend_percent"   // how much of its quota it lends at most, in percent; without: all
)

// MaxBorrowPercent bounds rx_borrow_percent.
const MaxBorrowPercent = 100_000

// Namespace is a tenant: what jobs, their work and their quota belong to.
type Namespace struct {
	Name                  string
	Description           string
	Quota                 string // by name; "": none
	Capabilities          *NamespaceCapabilities
	NodePoolConfiguration *NamespaceNodePools
	Meta                  map[string]string
	CreateIndex           uint64
	ModifyIndex           uint64
}

// NamespaceCapabilities says which task drivers the jobs of a namespace may use: those that are enabled
// (none named: all), without those that are disabled.
type NamespaceCapabilities struct {
	EnabledTaskDrivers  []string
	DisabledTaskDrivers []string
}

// NamespaceNodePools says which node pools the jobs of a namespace may use, by globs. Allowed and Denied
// exclude each other; with Allowed the default is allowed as well.
type NamespaceNodePools struct {
	Default         string // of jobs that name none
	Allowed, Denied []string
}

// Quota bounds what the allocations of namespaces hold together.
type Quota struct {
	Name        string
	Description string
	Limits      []*QuotaLimit // one at most: that of the region
	CreateIndex uint64
	ModifyIndex uint64
}

// QuotaLimit is the limit in one region. Of a number nil and 0 mean no limit, and below 0: none at all.
type QuotaLimit struct {
	Region      string
	CPU         *int64 // MHz
	MemoryMB    *int64
	MemoryMaxMB *int64
	Devices     []*QuotaDevice
}

// QuotaDevice limits devices named TYPE, VENDOR/TYPE or VENDOR/TYPE/NAME, or, where TYPE ends in -milli or
// -mib, the thousandths or the memory of them that are held. Count 0 means none at all: a kind of devices
// that is not named is not limited.
//
// A device that is held as a whole counts 1000 thousandths and all its memory. A share counts the
// thousandths of the device's time or memory that it has, whichever are more, and its MiB. So a limit of 4
// nvidia/gpu and one of 4000 nvidia/gpu-milli are the same, and four GPUs, or sixteen quarters, reach it.
type QuotaDevice struct {
	Name  string
	Count int64
}

// UpsertNamespaces creates or replaces namespaces.
type UpsertNamespaces struct {
	Stamp
	Namespaces []*Namespace
}

// DeleteNamespaces removes namespaces in which nothing is left but jobs that are dead.
type DeleteNamespaces struct {
	Stamp
	Names []string
}

// UpsertQuotas creates or replaces quotas. What is held beyond a lower limit goes on.
type UpsertQuotas struct {
	Stamp
	Quotas []*Quota
}

// DeleteQuotas removes quotas that no namespace names.
type DeleteQuotas struct {
	Stamp
	Names []string
}

func (*UpsertNamespaces) kind() Kind { return KindUpsertNamespaces }
func (*DeleteNamespaces) kind() Kind { return KindDeleteNamespaces }
func (*UpsertQuotas) kind() Kind     { return KindUpsertQuotas }
func (*DeleteQuotas) kind() Kind     { return KindDeleteQuotas }

var namespaceTable = &Table{
	Name: TableNamespaces, Record: 64, New: func() any { return new(Namespace) },
	key: func(v any) string { return v.(*Namespace).Name },
	by: map[string]func(any) string{
		"quota":  func(v any) string { return v.(*Namespace).Quota },
		"cohort": func(v any) string { return v.(*Namespace).Cohort() },
	},
}

var quotaTable = &Table{
	Name: TableQuotas, Record: 214, New: func() any { return new(Quota) },
	key: func(v any) string { return v.(*Quota).Name },
}

// defaultNamespace is there before anybody has described it.
var defaultNamespace = &Namespace{Name: DefaultNamespace, Description: "Default shared namespace", CreateIndex: 1, ModifyIndex: 1}

// Namespace returns a namespace by name. The default one is always there.
func (s *Snapshot) Namespace(ws WatchSet, name string) *Namespace {
	n := first[Namespace](s.txn, ws, TableNamespaces, "id", name)
	if n == nil && name == DefaultNamespace {
		return defaultNamespace
	}
	return n
}

// Namespaces returns the namespaces whose name begins with prefix, by name.
func (s *Snapshot) Namespaces(ws WatchSet, prefix string) []*Namespace {
	all := list[Namespace](s.txn, ws, TableNamespaces, "id_prefix", prefix)
	if strings.HasPrefix(DefaultNamespace, prefix) {
		at, there := slices.BinarySearchFunc(all, DefaultNamespace, func(n *Namespace, name string) int { return strings.Compare(n.Name, name) })
		if !there {
			all = slices.Insert(all, at, defaultNamespace)
		}
	}
	return all
}

// Quota returns a quota by name.
func (s *Snapshot) Quota(ws WatchSet, name string) *Quota {
	return first[Quota](s.txn, ws, TableQuotas, "id", name)
}

// Quotas returns the quotas whose name begins with prefix, by name.
func (s *Snapshot) Quotas(ws WatchSet, prefix string) []*Quota {
	return list[Quota](s.txn, ws, TableQuotas, "id_prefix", prefix)
}

// QuotaNamespaces returns the namespaces that name a quota, by name.
func (s *Snapshot) QuotaNamespaces(ws WatchSet, quota string) []*Namespace {
	return list[Namespace](s.txn, ws, TableNamespaces, "quota", quota)
}

// Cohort is the group of namespaces that it lends to and borrows from, "" for none.
func (n *Namespace) Cohort() string { return n.Meta[MetaCohort] }

// percent reads a percentage of the namespace's meta.
func (n *Namespace) percent(key string, without int64) int64 {
	v, err := strconv.ParseInt(n.Meta[key], 10, 64)
	if err != nil {
		return without // it is not there: Faults has checked the others
	}
	return v
}

// Preemptible says whether all of the job's work may be preempted for those who want back what
// they have lent: only such work borrows.
func (j *Job) Preemptible() bool {
	for _, g := range j.TaskGroups {
		if g.Preempt == nil || !g.Preempt.Reclaim {
			return false
		}
	}
	return true
}

var (
	tenantName = regexp.MustCompile(`^[a-zA-Z0-9-]{1,128}$`)
	cohortName = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,128}$`)
)

// Faults lists all that is wrong with a namespace itself.
func (n *Namespace) Faults() (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	if !tenantName.MatchString(n.Name) {
		fault("invalid name %q. Must match regex %s", n.Name, tenantName)
	}
	if len(n.Description) > MaxDescription {
		fault("description longer than %d", MaxDescription)
	}
	if n.Quota != "" && !tenantName.MatchString(n.Quota) {
		fault("invalid quota %q", n.Quota)
	}
	size := 0
	for k, v := range n.Meta {
		size += len(k) + len(v)
	}
	if size > MaxTenantMeta {
		fault("meta has %d bytes; at most %d are allowed", size, MaxTenantMeta)
	}
	cohort, grouped := n.Meta[MetaCohort]
	if grouped && !cohortName.MatchString(cohort) {
		fault("meta.%s: %q is no name of a cohort: 1 to 128 letters, digits, - and _", MetaCohort, cohort)
	}
	if grouped && n.Quota == "" {
		fault("meta.%s: a namespace of a cohort needs a quota, of which it lends and beyond which it borrows", MetaCohort)
	}
	for _, p := range []struct {
		key  string
		most int64
	}{{MetaBorrowPercent, MaxBorrowPercent}, {MetaLendPercent, 100}} {
		text, there := n.Meta[p.key]
		if !there {
			continue
		}
		if v, err := strconv.ParseInt(text, 10, 64); err != nil || v < 0 || v > p.most {
			fault("meta.%s: %q is no percentage from 0 to %d", p.key, text, p.most)
		}
		if !grouped {
			fault("meta.%s: means nothing without %s", p.key, MetaCohort)
		}
	}
	if c := n.Capabilities; c != nil && len(c.EnabledTaskDrivers)+len(c.DisabledTaskDrivers) > maxTenantList {
		fault("capabilities name more than %d task drivers", maxTenantList)
	}
	if p := n.NodePoolConfiguration; p != nil {
		if len(p.Allowed) > 0 && len(p.Denied) > 0 {
			fault("node_pool_config: allowed and denied exclude each other")
		}
		if len(p.Allowed)+len(p.Denied) > maxTenantList {
			fault("node_pool_config names more than %d node pools", maxTenantList)
		}
		for _, glob := range slices.Concat(p.Allowed, p.Denied) {
			if _, err := path.Match(glob, ""); err != nil {
				fault("node_pool_config: %q is no pattern of names", glob)
			}
		}
		if p.Default != "" && matchesAny(p.Denied, p.Default) {
			fault("node_pool_config: the default node pool %q is denied", p.Default)
		}
	}
	return faults
}

func matchesAny(globs []string, name string) bool {
	return slices.ContainsFunc(globs, func(glob string) bool { ok, _ := path.Match(glob, name); return ok })
}

// refuses lists what a job asks for that its namespace does not allow.
func (n *Namespace) refuses(j *Job) (faults []string) {
	if c := n.Capabilities; c != nil {
		for _, g := range j.TaskGroups {
			for _, t := range g.Tasks {
				if len(c.EnabledTaskDrivers) > 0 && !slices.Contains(c.EnabledTaskDrivers, t.Driver) || slices.Contains(c.DisabledTaskDrivers, t.Driver) {
					faults = append(faults, fmt.Sprintf("group.%s.task.%s.driver: task driver %q is not allowed in namespace %q", g.Name, t.Name, t.Driver, n.Name))
				}
			}
		}
	}
	if p := n.NodePoolConfiguration; p != nil {
		pool := j.NodePool
		if pool == "" {
			pool = DefaultNodePool
		}
		allowed := !matchesAny(p.Denied, pool)
		if len(p.Allowed) > 0 {
			allowed = pool == p.Default || matchesAny(p.Allowed, pool)
		}
		if !allowed {
			faults = append(faults, fmt.Sprintf("node_pool: node pool %q is not allowed in namespace %q", pool, n.Name))
		}
	}
	return faults
}

// Faults lists all that is wrong with a quota itself.
func (q *Quota) Faults() (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	if !tenantName.MatchString(q.Name) {
		fault("invalid name %q. Must match regex %s", q.Name, tenantName)
	}
	if len(q.Description) > MaxDescription {
		fault("description longer than %d", MaxDescription)
	}
	if len(q.Limits) == 0 {
		fault("must provide at least one quota limit")
	}
	if len(q.Limits) > 1 {
		fault("has %d limits; a region has one", len(q.Limits))
	}
	for i, l := range q.Limits {
		if l == nil {
			fault("limit[%d] is null", i)
			continue
		}
		if len(l.Devices) > MaxQuotaDevices {
			fault("limit[%d]: limits more than %d devices", i, MaxQuotaDevices)
		}
		seen := map[dimension]string{}
		for _, d := range l.Devices {
			switch {
			case d == nil || d.Name == "" || len(d.Name) > 128 || strings.Count(d.Name, "/") > 2 || slices.Contains(strings.Split(d.Name, "/"), ""):
				fault("limit[%d]: a device must be named TYPE, VENDOR/TYPE or VENDOR/TYPE/NAME", i)
				continue
			case d.Count < 0 || d.Count > maxDeviceCount:
				fault("limit[%d].device.%s.count: is %d; it must be between 0 and %d", i, d.Name, d.Count, maxDeviceCount)
			}
			dim := deviceDimension(d.Name)
			if other, twice := seen[dim]; twice {
				fault("limit[%d].device.%s: limits the same as %s; give one of them", i, d.Name, other)
			}
			seen[dim] = d.Name
		}
	}
	return faults
}

// maxDeviceCount bounds the count of a device limit, so that thousandths of it can be counted.
const maxDeviceCount = 1 << 40
