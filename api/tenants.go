package api

import (
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"

	nomad "github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/jobspec"
)

// needsUpgrade refuses what an older server of the region would stop at.
func (s *Server) needsUpgrade(cmd cluster.Command) error {
	return s.cfg.Store.State().Snapshot().Supports(cmd)
}

func (s *Server) listNamespaces(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		list := only(snap.Namespaces(ws, r.prefix), func(n *cluster.Namespace) bool { return r.may(acl.AnyInNamespace, n.Name, "") })
		same := func(n *cluster.Namespace) any { return n }
		index := max(1, snap.Index(ws, cluster.TableNamespaces))
		return page(r, index, list, true, func(n *cluster.Namespace) position { return named(n.Name) }, same, same)
	})
}

func (s *Server) readNamespace(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		n := snap.Namespace(ws, r.params["name"])
		if n == nil {
			return found{index: max(1, snap.Index(ws, cluster.TableNamespaces)), err: notFound("Namespace not found")}
		}
		return found{body: n, index: n.ModifyIndex}
	})
}

func (s *Server) putNamespace(r *request) (any, error) {
	var req nomad.Namespace
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	if name, ok := r.params["name"]; ok && name != req.Name {
		return nil, badRequest("Namespace name does not match request path")
	}
	faults := jobspec.NamespaceMeta(req.Meta)
	later := func(field string) {
		faults = append(faults, field+": is not supported yet by rxvision; leave it out")
	}
	n := &cluster.Namespace{Name: req.Name, Description: req.Description, Quota: req.Quota, Meta: req.Meta}
	if c := req.Capabilities; c != nil {
		n.Capabilities = &cluster.NamespaceCapabilities{EnabledTaskDrivers: c.EnabledTaskDrivers, DisabledTaskDrivers: c.DisabledTaskDrivers}
		if len(c.EnabledNetworkModes) > 0 {
			later("capabilities.enabled_network_modes")
		}
		if len(c.DisabledNetworkModes) > 0 {
			later("capabilities.disabled_network_modes")
		}
	}
	if p := req.NodePoolConfiguration; p != nil && (p.Default != "" || len(p.Allowed)+len(p.Denied) > 0) {
		n.NodePoolConfiguration = &cluster.NamespaceNodePools{Default: p.Default, Allowed: p.Allowed, Denied: p.Denied}
	}
	if v := req.VaultConfiguration; v != nil && (v.Default != "" || len(v.Allowed)+len(v.Denied) > 0) {
		later("vault")
	}
	if c := req.ConsulConfiguration; c != nil && (c.Default != "" || len(c.Allowed)+len(c.Denied) > 0) {
		later("consul")
	}
	if faults = append(faults, n.Faults()...); len(faults) > 0 {
		return nil, refused(badRequest("namespace %q: %s", clip(n.Name), strings.Join(faults, "\n")))
	}
	return s.tenant(r, &cluster.UpsertNamespaces{Namespaces: []*cluster.Namespace{n}})
}

// tenant commits a change of namespaces or quotas, which all servers must know.
func (s *Server) tenant(r *request, cmd cluster.Command) (any, error) {
	if err := s.needsUpgrade(cmd); err != nil {
		return nil, err
	}
	out, err := s.change(r, cmd)
	return out, refused(err)
}

func (s *Server) deleteNamespace(r *request) (any, error) {
	return s.tenant(r, &cluster.DeleteNamespaces{Names: []string{r.params["name"]}})
}

// showQuota gives a quota as clients read it. The hash of a limit is what its usage is found by.
func showQuota(q *cluster.Quota) *nomad.QuotaSpec {
	out := &nomad.QuotaSpec{Name: q.Name, Description: q.Description, Limits: []*nomad.QuotaLimit{}, CreateIndex: q.CreateIndex, ModifyIndex: q.ModifyIndex}
	for _, l := range q.Limits {
		res := &nomad.QuotaResources{CPU: shortInt(l.CPU), MemoryMB: shortInt(l.MemoryMB), MemoryMaxMB: shortInt(l.MemoryMaxMB)}
		for _, d := range l.Devices {
			count := uint64(d.Count)
			res.Devices = append(res.Devices, &nomad.RequestedDevice{Name: d.Name, Count: &count})
		}
		out.Limits = append(out.Limits, &nomad.QuotaLimit{Region: l.Region, RegionLimit: res, Hash: limitHash(l)})
	}
	return out
}

func shortInt(v *int64) *int {
	if v == nil {
		return nil
	}
	n := int(*v)
	return &n
}

func limitHash(l *cluster.QuotaLimit) []byte {
	sum := sha256.Sum256(cluster.Marshal(&cluster.Quota{Limits: []*cluster.QuotaLimit{l}}))
	return sum[:]
}

// showUsage says what is held of each thing that a quota limits; what it does not limit, in CPU and memory.
func showUsage(snap *cluster.Snapshot, ws cluster.WatchSet, name string) *nomad.QuotaUsage {
	q, held := snap.QuotaHeld(ws, name)
	if q == nil {
		return nil
	}
	out := &nomad.QuotaUsage{Name: q.Name, Used: map[string]*nomad.QuotaLimit{}, CreateIndex: q.CreateIndex, ModifyIndex: q.ModifyIndex}
	for _, l := range q.Limits {
		res := &nomad.QuotaResources{CPU: shortInt(&held.Total.CPU), MemoryMB: shortInt(&held.Total.MemoryMB), MemoryMaxMB: shortInt(&held.Total.MemoryMaxMB)}
		for _, d := range l.Devices {
			count := uint64(d.Held(&held.Total))
			res.Devices = append(res.Devices, &nomad.RequestedDevice{Name: d.Name, Count: &count})
		}
		hash := limitHash(l)
		out.Used[base64.StdEncoding.EncodeToString(hash)] = &nomad.QuotaLimit{Region: l.Region, RegionLimit: res, Hash: hash}
	}
	return out
}

func quotaAt(q *cluster.Quota) position { return named(q.Name) }

func (s *Server) listQuotas(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		show := func(q *cluster.Quota) any { return showQuota(q) }
		return page(r, snap.Index(ws, cluster.TableQuotas), snap.Quotas(ws, r.prefix), true, quotaAt, show, show)
	})
}

func (s *Server) listUsages(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		show := func(q *cluster.Quota) any { return showUsage(snap, ws, q.Name) }
		index := snap.Index(ws, cluster.TableQuotas, cluster.TableNamespaces, cluster.TableAllocs)
		return page(r, index, snap.Quotas(ws, r.prefix), true, quotaAt, show, show)
	})
}

func (s *Server) readQuota(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		q := snap.Quota(ws, r.params["name"])
		if q == nil {
			return missing(snap, ws, cluster.TableQuotas, "quota not found")
		}
		return found{body: showQuota(q), index: q.ModifyIndex}
	})
}

func (s *Server) readUsage(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		u := showUsage(snap, ws, r.params["name"])
		if u == nil {
			return missing(snap, ws, cluster.TableQuotas, "quota not found")
		}
		return found{body: u, index: snap.Index(ws, cluster.TableQuotas, cluster.TableNamespaces, cluster.TableAllocs)}
	})
}

func (s *Server) putQuota(r *request) (any, error) {
	var req nomad.QuotaSpec
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	if name, ok := r.params["name"]; ok && name != req.Name {
		return nil, badRequest("Quota name does not match request path")
	}
	q, faults := readQuotaSpec(&req, s.cfg.Region)
	if faults = append(faults, q.Faults()...); len(faults) > 0 {
		return nil, refused(badRequest("quota %q: %s", clip(req.Name), strings.Join(faults, "\n")))
	}
	return s.tenant(r, &cluster.UpsertQuotas{Quotas: []*cluster.Quota{q}})
}

func (s *Server) deleteQuota(r *request) (any, error) {
	return s.tenant(r, &cluster.DeleteQuotas{Names: []string{r.params["name"]}})
}

// readQuotaSpec takes over a quota as a client sends it, and names all that is not honoured.
func readQuotaSpec(in *nomad.QuotaSpec, region string) (*cluster.Quota, []string) {
	q := &cluster.Quota{Name: in.Name, Description: in.Description}
	var faults []string
	for i, l := range in.Limits {
		at := fmt.Sprintf("limit[%d]", i)
		fault := func(field, format string, args ...any) {
			faults = append(faults, at+field+": "+fmt.Sprintf(format, args...))
		}
		later := func(field string) {
			fault(field, "is not supported yet by rxvision; leave it out, or say 0, which means no limit")
		}
		if l == nil {
			fault("", "is null")
			continue
		}
		if l.Region != region {
			fault(".region", "%q is not the region of these servers, which is %q", clip(l.Region), region)
		}
		if l.VariablesLimit != nil && *l.VariablesLimit != 0 {
			later(".variables_limit")
		}
		out := &cluster.QuotaLimit{Region: l.Region}
		q.Limits = append(q.Limits, out)
		res := l.RegionLimit
		if res == nil {
			fault(".region_limit", "is missing")
			continue
		}
		out.CPU, out.MemoryMB, out.MemoryMaxMB = longInt(res.CPU), longInt(res.MemoryMB), longInt(res.MemoryMaxMB)
		if res.Cores != nil && *res.Cores != 0 {
			later(".region_limit.cores")
		}
		if res.SecretsMB != nil && *res.SecretsMB != 0 {
			later(".region_limit.secrets")
		}
		if res.NUMA != nil && (cmp.Or(res.NUMA.Affinity, "none") != "none" || len(res.NUMA.Devices) > 0) {
			later(".region_limit.numa")
		}
		if st := res.Storage; st != nil {
			if st.VariablesMB != 0 {
				later(".region_limit.storage.variables")
			}
			if st.HostVolumesMB != 0 {
				later(".region_limit.storage.host_volumes")
			}
		}
		for _, d := range res.Devices {
			if d == nil {
				fault(".region_limit.device", "is null")
				continue
			}
			field := ".region_limit.device." + clip(d.Name)
			if len(d.Constraints) > 0 {
				fault(field+".constraint", "is not supported yet by rxvision; name the device's model instead: VENDOR/TYPE/MODEL")
			}
			if len(d.Affinities) > 0 {
				fault(field+".affinity", "means nothing in a quota; leave it out")
			}
			count := int64(1)
			if d.Count != nil {
				count = int64(min(*d.Count, 1<<62))
			}
			out.Devices = append(out.Devices, &cluster.QuotaDevice{Name: d.Name, Count: count})
		}
	}
	return q, slices.Compact(faults)
}

func longInt(v *int) *int64 {
	if v == nil {
		return nil
	}
	n := int64(*v)
	return &n
}
