package jobspec

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
)

// Types of a difference.
const (
	diffNone    = "None"
	diffAdded   = "Added"
	diffDeleted = "Deleted"
	diffEdited  = "Edited"
)

// Diff tells how new differs from old as the tree that `nomad job plan` and `nomad
// job history -p` print: fields by their Go names, sorted; maps and the driver's
// config flattened to Name[key] and key[0]; one TaskGroups entry per group and one
// Tasks entry per task, changed or not. old is nil for a new job, new for a deleted
// one. contextual also lists the unchanged fields of changed blocks. What plan
// would do is noted on groups and tasks; nil leaves the notes out.
//
// What the state sets by itself (status, version, indexes) is no difference. The
// model that an onnx task pins is one when both jobs have theirs pinned.
func Diff(old, new *cluster.Job, contextual bool, plan *cluster.PlanAnnotations) *api.JobDiff {
	d := differ{contextual}
	o, n := reflect.ValueOf(old), reflect.ValueOf(new)
	out := &api.JobDiff{Fields: fieldDiffs(flat(o, jobBlock.skip), flat(n, jobBlock.skip), false), Objects: d.objects(o, n, jobBlock)}
	changed := len(out.Fields)+len(out.Objects) > 0
	var oldGroups, newGroups []*cluster.TaskGroup
	if old != nil {
		out.ID, oldGroups = old.ID, old.TaskGroups
	}
	if new != nil {
		out.ID, newGroups = new.ID, new.TaskGroups
	}
	for _, p := range pair(oldGroups, newGroups, func(g *cluster.TaskGroup) string { return g.Name }) {
		g := d.group(p)
		if changed = changed || g.Type != diffNone; plan != nil {
			annotate(g, plan.DesiredTGUpdates[p.key])
		}
		out.TaskGroups = append(out.TaskGroups, g)
	}
	out.Type = diffType(old == nil, new == nil, changed)
	return out
}

type differ struct{ contextual bool }

func (d differ) group(p pairOf[cluster.TaskGroup]) *api.TaskGroupDiff {
	o, n := reflect.ValueOf(p.old), reflect.ValueOf(p.new)
	out := &api.TaskGroupDiff{
		Name:    p.key,
		Fields:  fieldDiffs(flat(o, groupBlock.skip), flat(n, groupBlock.skip), false),
		Objects: d.objects(o, n, groupBlock),
	}
	changed := len(out.Fields)+len(out.Objects) > 0
	var oldTasks, newTasks []*cluster.Task
	if p.old != nil {
		oldTasks = p.old.Tasks
	}
	if p.new != nil {
		newTasks = p.new.Tasks
	}
	for _, tasks := range pair(oldTasks, newTasks, func(t *cluster.Task) string { return t.Name }) {
		t := d.task(tasks, p)
		changed = changed || t.Type != diffNone
		out.Tasks = append(out.Tasks, t)
	}
	out.Type = diffType(p.old == nil, p.new == nil, changed)
	return out
}

func (d differ) task(p pairOf[cluster.Task], g pairOf[cluster.TaskGroup]) *api.TaskDiff {
	old, new := ownRestart(p.old, g.old), ownRestart(p.new, g.new)
	o, n := reflect.ValueOf(old), reflect.ValueOf(new)
	out := &api.TaskDiff{Name: p.key, Fields: fieldDiffs(flat(o, taskBlock.skip), flat(n, taskBlock.skip), false)}
	if config := d.object("Config", flatConfig(old), flatConfig(new), old == nil, new == nil, nil); config != nil {
		out.Objects = append(out.Objects, config)
	}
	out.Objects = append(out.Objects, d.objects(o, n, taskBlock)...)
	if old != nil && new != nil && pinned(old.Model) && pinned(new.Model) {
		out.Objects = append(out.Objects, d.objects(o, n, modelBlock)...)
	}
	out.Type = diffType(old == nil, new == nil, len(out.Fields)+len(out.Objects) > 0)
	return out
}

func pinned(m *cluster.ModelRef) bool { return m != nil && m.Digest != "" }

// ownRestart drops the restart policy of a task that has its group's, so that a
// change of the group's shows once.
func ownRestart(t *cluster.Task, g *cluster.TaskGroup) *cluster.Task {
	if t == nil || g == nil || !reflect.DeepEqual(t.RestartPolicy, g.RestartPolicy) {
		return t
	}
	own := *t
	own.RestartPolicy = nil
	return &own
}

// block describes how a struct is shown: its scalar fields except skip, and the
// blocks within it.
type block struct {
	skip     []string
	children []child
}

// child is a field that holds a block (a pointer), a list of blocks, or a list of
// strings. Blocks of a list that have the same key are one block that changed.
type child struct {
	field, name string
	key         func(any) string
	block       block
}

var (
	jobBlock = block{
		skip: []string{
			"ID", "Status", "StatusDescription", "Stable", "Version", "SubmitTime", "CreateIndex", "ModifyIndex", "JobModifyIndex",
		},
		children: []child{
			{field: "Datacenters", name: "Datacenters"},
			constraints,
			affinities,
			spreads,
			{field: "Periodic", name: "Periodic", block: block{children: []child{{field: "Specs", name: "Specs"}}}},
			{field: "ParameterizedJob", name: "ParameterizedJob", block: block{children: []child{
				{field: "MetaOptional", name: "MetaOptional"}, {field: "MetaRequired", name: "MetaRequired"},
			}}},
		},
	}
	groupBlock = block{
		skip: []string{"Name", "MaxRunDuration"}, // the meta block tells of it
		children: []child{
			constraints,
			affinities,
			spreads,
			{field: "Disconnect", name: "Disconnect"},
			{field: "RestartPolicy", name: "RestartPolicy"},
			{field: "Migrate", name: "Migrate"},
			{field: "ReschedulePolicy", name: "ReschedulePolicy"},
			{field: "EphemeralDisk", name: "EphemeralDisk"},
			{field: "Scaling", name: "Scaling", block: block{skip: []string{"Policy", "Cooldown", "CooldownUp", "Window"}}},
			{field: "Update", name: "Update", block: block{skip: []string{"Stagger"}}},
			{field: "Networks", name: "Network", key: sameKey, block: networkBlock},
			{field: "Services", name: "Service", key: fieldKey("Name"), block: serviceBlock},
		},
	}
	networkBlock = block{
		skip: []string{"Device", "CIDR", "IP", "MBits"},
		children: []child{
			{field: "ReservedPorts", name: "Static Port", key: fieldKey("Label")},
			{field: "DynamicPorts", name: "Dynamic Port", key: fieldKey("Label"), block: block{skip: []string{"Value"}}},
		},
	}
	serviceBlock = block{children: []child{
		{field: "Tags", name: "Tags"},
		{field: "CanaryTags", name: "CanaryTags"},
		{field: "Checks", name: "Check", key: fieldKey("Name"), block: block{children: []child{{field: "CheckRestart", name: "CheckRestart"}}}},
	}}
	taskBlock = block{
		skip: []string{"Name"},
		children: []child{
			constraints,
			affinities,
			{field: "Resources", name: "Resources", block: block{children: []child{
				{field: "Devices", name: "Device", key: fieldKey("Name"), block: block{children: []child{constraints, affinities}}},
			}}},
			{field: "RestartPolicy", name: "RestartPolicy"},
			{field: "LogConfig", name: "LogConfig"},
			{field: "Artifacts", name: "Artifact", key: fieldKey("GetterSource", "RelativeDest")},
			{field: "Templates", name: "Template", key: fieldKey("DestPath")},
			{field: "DispatchPayload", name: "DispatchPayload"},
			{field: "Lifecycle", name: "Lifecycle"},
			{field: "Services", name: "Service", key: fieldKey("Name"), block: serviceBlock},
		},
	}
	modelBlock  = block{children: []child{{field: "Model", name: "Model"}}}
	constraints = child{field: "Constraints", name: "Constraint", key: fieldKey("LTarget", "Operand", "RTarget")}
	affinities  = child{field: "Affinities", name: "Affinity", key: fieldKey("LTarget", "Operand", "RTarget")}
	spreads     = child{field: "Spreads", name: "Spread", key: fieldKey("Attribute"), block: block{children: []child{
		{field: "SpreadTarget", name: "SpreadTarget", key: fieldKey("Value")},
	}}}
)

func sameKey(any) string { return "" }

func fieldKey(names ...string) func(any) string {
	return func(v any) string {
		s := reflect.ValueOf(v).Elem()
		var key []string
		for _, n := range names {
			key = append(key, s.FieldByName(n).String())
		}
		return strings.Join(key, "\x00")
	}
}

// objects compares the blocks within two structs, given by pointers that may be nil.
func (d differ) objects(old, new reflect.Value, b block) []*api.ObjectDiff {
	var out []*api.ObjectDiff
	for _, c := range b.children {
		o, n := fieldOf(old, c.field), fieldOf(new, c.field)
		var pairs []pairOf[any]
		switch {
		case c.key != nil:
			pairs = pair(blocks(o), blocks(n), func(p *any) string { return c.key(*p) })
		case isStrings(o) || isStrings(n):
			if s := stringsDiff(c.name, o, n); s != nil {
				out = append(out, s)
			}
			continue
		default:
			pairs = []pairOf[any]{{"", pointer(o), pointer(n)}}
		}
		for _, p := range pairs {
			ov, nv := deref(p.old), deref(p.new)
			inner := d.objects(ov, nv, c.block)
			if diff := d.object(c.name, flat(ov, c.block.skip), flat(nv, c.block.skip), p.old == nil, p.new == nil, inner); diff != nil {
				out = append(out, diff)
			}
		}
	}
	return out
}

// object is the difference of one block, nil when there is none.
func (d differ) object(name string, old, new map[string]string, noOld, noNew bool, inner []*api.ObjectDiff) *api.ObjectDiff {
	changed := len(inner) > 0 || !maps.Equal(old, new)
	t := diffType(noOld, noNew, changed)
	if t == diffNone || len(old)+len(new) == 0 && len(inner) == 0 {
		return nil
	}
	return &api.ObjectDiff{Type: t, Name: name, Fields: fieldDiffs(old, new, d.contextual), Objects: inner}
}

func isStrings(v reflect.Value) bool { return v.IsValid() && v.Type() == reflect.TypeFor[[]string]() }

func stringsDiff(name string, old, new reflect.Value) *api.ObjectDiff {
	list := func(v reflect.Value) []string {
		if !v.IsValid() {
			return nil
		}
		return v.Interface().([]string)
	}
	o, n := list(old), list(new)
	diff := &api.ObjectDiff{Type: diffType(len(o) == 0, len(n) == 0, true), Name: name}
	for _, s := range slices.Compact(slices.Sorted(slices.Values(slices.Concat(o, n)))) {
		switch inOld, inNew := slices.Contains(o, s), slices.Contains(n, s); {
		case !inOld:
			diff.Fields = append(diff.Fields, &api.FieldDiff{Type: diffAdded, Name: name, New: s})
		case !inNew:
			diff.Fields = append(diff.Fields, &api.FieldDiff{Type: diffDeleted, Name: name, Old: s})
		}
	}
	if len(diff.Fields) == 0 {
		return nil
	}
	return diff
}

func fieldDiffs(old, new map[string]string, contextual bool) []*api.FieldDiff {
	all := maps.Clone(old)
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, new)
	var out []*api.FieldDiff
	for _, name := range sortedKeys(all) {
		f := &api.FieldDiff{Name: name, Old: old[name], New: new[name]}
		f.Type = diffType(f.Old == "", f.New == "", f.Old != f.New)
		if f.Type != diffNone || contextual {
			out = append(out, f)
		}
	}
	return out
}

func diffType(noOld, noNew, changed bool) string {
	switch {
	case noOld && noNew, !noOld && !noNew && !changed:
		return diffNone
	case noOld:
		return diffAdded
	case noNew:
		return diffDeleted
	}
	return diffEdited
}

// pairOf is something of a name, before and after; nil where it is not there.
type pairOf[T any] struct {
	key      string
	old, new *T
}

// pair matches the elements of two lists by key, sorted by key. Elements of one
// list with equal keys are matched in their order.
func pair[T any](old, new []*T, key func(*T) string) []pairOf[T] {
	var out []pairOf[T]
	used := map[string]int{}
	for _, o := range old {
		k := key(o)
		out = append(out, pairOf[T]{key: k, old: o})
	}
	for _, n := range new {
		k := key(n)
		found := -1
		for i := used[k]; i < len(out) && found < 0; i++ {
			if out[i].key == k && out[i].old != nil && out[i].new == nil {
				found = i
			}
		}
		if found < 0 {
			out = append(out, pairOf[T]{key: k, new: n})
			continue
		}
		out[found].new = n
		used[k] = found + 1
	}
	slices.SortStableFunc(out, func(a, b pairOf[T]) int { return strings.Compare(a.key, b.key) })
	return out
}

// fieldOf reads a field of the struct that v points to; invalid when v is nil.
func fieldOf(v reflect.Value, name string) reflect.Value {
	if !v.IsValid() || v.IsNil() {
		return reflect.Value{}
	}
	return v.Elem().FieldByName(name)
}

// pointer boxes a pointer to a struct; nil for a nil one.
func pointer(v reflect.Value) *any {
	if !v.IsValid() || v.IsNil() {
		return nil
	}
	p := v.Interface()
	return &p
}

func deref(p *any) reflect.Value {
	if p == nil {
		return reflect.Value{}
	}
	return reflect.ValueOf(*p)
}

// blocks boxes the elements of a list of structs or of pointers to structs.
func blocks(v reflect.Value) []*any {
	if !v.IsValid() {
		return nil
	}
	var out []*any
	for i := range v.Len() {
		e := v.Index(i)
		if e.Kind() == reflect.Struct {
			e = e.Addr()
		}
		out = append(out, pointer(e))
	}
	return out
}

// flat is the scalars of the struct that v points to, by name, maps flattened to
// Name[key]; nil for nil.
func flat(v reflect.Value, skip []string) map[string]string {
	if !v.IsValid() || v.IsNil() {
		return nil
	}
	out := map[string]string{}
	s := v.Elem()
	for i := range s.NumField() {
		name, f := s.Type().Field(i).Name, s.Field(i)
		if slices.Contains(skip, name) {
			continue
		}
		switch f.Kind() {
		case reflect.Map:
			for _, k := range f.MapKeys() {
				out[fmt.Sprintf("%s[%s]", name, k)] = f.MapIndex(k).String()
			}
		case reflect.Pointer:
			if d, ok := f.Interface().(*time.Duration); ok && d != nil {
				out[name] = fmt.Sprint(int64(*d))
			}
		case reflect.Struct, reflect.Slice:
		case reflect.Int64:
			out[name] = fmt.Sprint(f.Int())
		default:
			out[name] = fmt.Sprint(f.Interface())
		}
	}
	return out
}

func flatConfig(t *cluster.Task) map[string]string {
	if t == nil {
		return nil
	}
	var config map[string]any
	if json.Unmarshal(t.Config, &config) != nil {
		return map[string]string{"config": string(t.Config)} // no object: shown as it is
	}
	out := map[string]string{}
	for k, v := range config {
		flattenJSON(out, k, v)
	}
	return out
}

func flattenJSON(out map[string]string, name string, v any) {
	switch v := v.(type) {
	case []any:
		for i, e := range v {
			flattenJSON(out, fmt.Sprintf("%s[%d]", name, i), e)
		}
	case map[string]any:
		for k, e := range v {
			flattenJSON(out, name+"."+k, e)
		}
	case nil:
		out[name] = ""
	default:
		out[name], _ = scalar(v)
	}
}

// annotate notes on a group's difference what the plan would do about it.
func annotate(g *api.TaskGroupDiff, u *cluster.DesiredUpdates) {
	if u == nil {
		u = &cluster.DesiredUpdates{}
	}
	for verb, n := range map[string]uint64{
		"ignore": u.Ignore, "create": u.Place, "destroy": u.Stop, "migrate": u.Migrate, "canary": u.Canary,
		"in-place update": u.InPlaceUpdate, "create/destroy update": u.DestructiveUpdate,
	} {
		if n > 0 {
			if g.Updates == nil {
				g.Updates = map[string]uint64{}
			}
			g.Updates[verb] = n
		}
	}
	for _, f := range g.Fields {
		if f.Name == "Count" {
			f.Annotations = countNote(f)
		}
	}
	for _, t := range g.Tasks {
		switch {
		case t.Type == diffAdded:
			t.Annotations = []string{"forces create"}
		case t.Type == diffDeleted:
			t.Annotations = []string{"forces destroy"}
		case t.Type == diffEdited && u.DestructiveUpdate+u.Canary > 0:
			t.Annotations = []string{"forces create/destroy update"}
		case t.Type == diffEdited && u.InPlaceUpdate > 0:
			t.Annotations = []string{"forces in-place update"}
		}
	}
}

func countNote(f *api.FieldDiff) []string {
	var old, new int
	_, _ = fmt.Sscan(f.Old, &old) // "" counts as 0
	_, _ = fmt.Sscan(f.New, &new)
	switch {
	case new > old:
		return []string{"forces create"}
	case new < old:
		return []string{"forces destroy"}
	}
	return nil
}
