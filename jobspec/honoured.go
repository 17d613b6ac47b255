package jobspec

import (
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/hashicorp/nomad/api"
)

// notYet ends the fault of everything that Nomad's dialect has and this version
// does not act on.
const notYet = "is not supported yet by rxvision"

// honoured lists, for each block, the fields that FromAPI acts on. Every other
// field that a job sets is a fault: a new field of the api package is refused until
// somebody adds it here.
var honoured = map[reflect.Type]string{
	reflect.TypeFor[api.Job](): `Region Namespace ID Name Type Priority AllAtOnce Datacenters NodePool Constraints
		TaskGroups Update Reschedule Migrate Meta Affinities Spreads Periodic ParameterizedJob`,
	reflect.TypeFor[api.TaskGroup](): `Name Count Constraints Tasks RestartPolicy ReschedulePolicy EphemeralDisk
		Update Migrate Networks Meta ShutdownDelay Disconnect MaxClientDisconnect PreventRescheduleOnLost
		Affinities Spreads Scaling Services`,
	reflect.TypeFor[api.Service](): `Name Tags CanaryTags PortLabel AddressMode Address Checks CheckRestart TaskName
		Provider OnUpdate`,
	reflect.TypeFor[api.ServiceCheck](): `Name Type Path Protocol PortLabel AddressMode Interval Timeout TLSServerName
		TLSSkipVerify Header Method CheckRestart TaskName Body OnUpdate`,
	reflect.TypeFor[api.CheckRestart]():  `Limit Grace`,
	reflect.TypeFor[api.ScalingPolicy](): `Type Min Max Enabled Policy`,
	reflect.TypeFor[api.Task](): `Name Driver User Config Constraints Env Resources RestartPolicy Meta KillTimeout
		LogConfig Artifacts Templates Leader ShutdownDelay KillSignal Affinities DispatchPayload
		Lifecycle Services`,
	reflect.TypeFor[api.Constraint]():   `LTarget RTarget Operand`,
	reflect.TypeFor[api.Affinity]():     `LTarget RTarget Operand Weight`,
	reflect.TypeFor[api.Spread]():       `Attribute Weight SpreadTarget`,
	reflect.TypeFor[api.SpreadTarget](): `Value Percent`,
	reflect.TypeFor[api.UpdateStrategy](): `Stagger MaxParallel HealthCheck MinHealthyTime HealthyDeadline
		ProgressDeadline Canary AutoRevert AutoPromote`,
	reflect.TypeFor[api.ReschedulePolicy]():   `Attempts Interval Delay DelayFunction MaxDelay Unlimited`,
	reflect.TypeFor[api.DisconnectStrategy](): `LostAfter Replace Reconcile`,
	reflect.TypeFor[api.MigrateStrategy]():    `MaxParallel HealthCheck MinHealthyTime HealthyDeadline`,
	reflect.TypeFor[api.RestartPolicy]():      `Interval Attempts Delay Mode`,
	reflect.TypeFor[api.EphemeralDisk]():      `SizeMB`,
	reflect.TypeFor[api.NetworkResource]():    `Mode ReservedPorts DynamicPorts`,
	reflect.TypeFor[api.Port]():               `Label Value HostNetwork`,
	reflect.TypeFor[api.Resources]():          `CPU MemoryMB Devices`,
	reflect.TypeFor[api.RequestedDevice]():    `Name Count Constraints Affinities`,
	reflect.TypeFor[api.LogConfig]():          `MaxFiles MaxFileSizeMB Disabled`,
	reflect.TypeFor[api.TaskArtifact]():       `GetterSource GetterOptions GetterHeaders GetterMode RelativeDest`,
	// Templates may refer only to what is fixed when the task starts, so that
	// nothing ever changes under one: modes, signals and splay are accepted and idle.
	reflect.TypeFor[api.Template](): `SourcePath DestPath EmbeddedTmpl ChangeMode ChangeSignal Once Splay Perms
		LeftDelim RightDelim Envvars`,

	reflect.TypeFor[api.TaskLifecycle](): `Hook Sidecar`,

	reflect.TypeFor[api.PeriodicConfig]():         `Enabled Spec Specs SpecType ProhibitOverlap TimeZone`,
	reflect.TypeFor[api.ParameterizedJobConfig](): `Payload MetaRequired MetaOptional`,
	reflect.TypeFor[api.DispatchPayloadConfig]():  `File`,
}

// setByState names the fields of a job that the state owns. Whoever sends a job
// back that he was given sends them along; they are not the user's to set.
const setByState = `Stop Status StatusDescription Stable Version SubmitTime CreateIndex ModifyIndex JobModifyIndex
	VersionTag NomadTokenID ParentID Dispatched DispatchIdempotencyToken Payload`

// neutral says of a field that is set whether it means the same as leaving it out.
// Servers of Nomad fill these in, and answers that they gave are submitted again.
var neutral = map[string]func(v any) bool{
	"Task.Identity":       func(v any) bool { return defaultIdentity(v.(*api.WorkloadIdentity)) },
	"TaskGroup.Consul":    func(v any) bool { return defaultConsul(v.(*api.Consul)) },
	"Task.Consul":         func(v any) bool { return defaultConsul(v.(*api.Consul)) },
	"LogConfig.Enabled":   func(v any) bool { return *v.(*bool) },
	"Template.VaultGrace": zero,
	"Service.Cluster":     func(v any) bool { return v.(string) == "" || v.(string) == "default" },
}

func zero(v any) bool { return isZero(reflect.ValueOf(v)) }

func defaultIdentity(id *api.WorkloadIdentity) bool {
	return (id.Name == "" || id.Name == "default") && !id.Env && !id.File && id.TTL == 0
}

func defaultConsul(c *api.Consul) bool {
	return c.Namespace == "" && c.Partition == "" && (c.Cluster == "" || c.Cluster == "default")
}

// fieldRule is what unsupported does with one field of a block.
type fieldRule struct {
	index   int
	step    string           // its name in a path
	descend bool             // honoured: look at the blocks in it; else it must not be set
	elem    reflect.Type     // of descend: the type of these blocks
	label   int              // … and their field that holds the label, -1 for none
	neutral func(v any) bool // as in neutral, nil for most
}

// rules holds the fields to look at of every honoured block; what neither holds
// blocks nor can be wrong is left out.
var rules = func() map[reflect.Type][]fieldRule {
	all := map[reflect.Type][]fieldRule{}
	for t, names := range honoured {
		fields, state := strings.Fields(names), strings.Fields(setByState)
		for i := range t.NumField() {
			f := t.Field(i)
			rule := fieldRule{index: i, step: hclName(f), label: -1, neutral: neutral[t.Name()+"."+f.Name]}
			switch {
			case slices.Contains(fields, f.Name):
				rule.descend, rule.elem = true, f.Type
				for rule.elem.Kind() == reflect.Pointer || rule.elem.Kind() == reflect.Slice {
					rule.elem = rule.elem.Elem()
				}
				if honoured[rule.elem] == "" {
					continue
				}
				if name, ok := labelField(rule.elem); ok {
					f, _ := rule.elem.FieldByName(name) // labelField found it
					rule.label = f.Index[0]
				}
			case t == reflect.TypeFor[api.Job]() && slices.Contains(state, f.Name):
				continue
			}
			all[t] = append(all[t], rule)
		}
	}
	return all
}()

// place is a path that is written out only where something is wrong.
type place struct {
	up   *place
	step string // one name
	i, n int    // of blocks of one name without labels: the i-th of n
}

func (p *place) String() string {
	if p == nil {
		return ""
	}
	return join(p.up.String(), element(p.step, p.i, p.n))
}

// unsupported reports every field below v that is set and not honoured, and every
// block that is null.
func (c *checker) unsupported(v reflect.Value, at *place) {
	for _, rule := range rules[v.Type()] {
		fv := v.Field(rule.index)
		switch {
		case rule.descend:
			c.blocks(fv, rule, at)
		case isSet(fv, rule.neutral):
			c.fault((&place{up: at, step: rule.step, n: 1}).String(), notYet)
		}
	}
}

// blocks descends into a field that holds blocks.
func (c *checker) blocks(v reflect.Value, rule fieldRule, at *place) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			c.unsupported(v.Elem(), &place{up: at, step: rule.step, n: 1})
		}
	case reflect.Slice:
		for i := range v.Len() {
			item := v.Index(i)
			if item.Kind() == reflect.Pointer {
				if item.IsNil() {
					c.fault((&place{up: at, step: fmt.Sprintf("%s[%d]", rule.step, i), n: 1}).String(), "is null")
					continue
				}
				item = item.Elem()
			}
			inside := &place{up: at, step: rule.step, i: i, n: v.Len()}
			if rule.label >= 0 {
				inside.n = 1
				inside = &place{up: inside, step: labelOf(item.Field(rule.label)), n: 1}
			}
			c.unsupported(item, inside)
		}
	}
}

func labelOf(v reflect.Value) string {
	if v.Kind() == reflect.Pointer {
		if v.IsNil() {
			return ""
		}
		v = v.Elem()
	}
	return v.String()
}

// isSet says whether a field asks for something: a scalar other than zero, a list
// or map with anything in it, any block.
func isSet(v reflect.Value, neutral func(any) bool) bool {
	switch {
	case v.Kind() == reflect.Pointer && v.IsNil():
		return false
	case neutral != nil:
		return !neutral(v.Interface())
	}
	return !isZero(v)
}

func isZero(v reflect.Value) bool {
	switch v.Kind() {
	case reflect.Pointer:
		return v.IsNil() || v.Elem().Kind() != reflect.Struct && isZero(v.Elem())
	case reflect.Slice, reflect.Map:
		return v.Len() == 0
	default:
		return v.IsZero()
	}
}
