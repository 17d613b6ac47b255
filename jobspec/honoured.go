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
		TaskGroups Update Reschedule Migrate Meta`,
	reflect.TypeFor[api.TaskGroup](): `Name Count Constraints Tasks RestartPolicy ReschedulePolicy EphemeralDisk
		Update Migrate Networks Meta ShutdownDelay Disconnect MaxClientDisconnect PreventRescheduleOnLost`,
	reflect.TypeFor[api.Task](): `Name Driver User Config Constraints Env Resources RestartPolicy Meta KillTimeout
		LogConfig Artifacts Templates Leader ShutdownDelay KillSignal`,
	reflect.TypeFor[api.Constraint](): `LTarget RTarget Operand`,
	reflect.TypeFor[api.UpdateStrategy](): `Stagger MaxParallel HealthCheck MinHealthyTime HealthyDeadline
		ProgressDeadline`,
	reflect.TypeFor[api.ReschedulePolicy]():   `Attempts Interval Delay DelayFunction MaxDelay Unlimited`,
	reflect.TypeFor[api.DisconnectStrategy](): `LostAfter Replace Reconcile`,
	reflect.TypeFor[api.MigrateStrategy]():    `MaxParallel HealthCheck MinHealthyTime HealthyDeadline`,
	reflect.TypeFor[api.RestartPolicy]():      `Interval Attempts Delay Mode`,
	reflect.TypeFor[api.EphemeralDisk]():      `SizeMB`,
	reflect.TypeFor[api.NetworkResource]():    `Mode ReservedPorts DynamicPorts`,
	reflect.TypeFor[api.Port]():               `Label Value HostNetwork`,
	reflect.TypeFor[api.Resources]():          `CPU MemoryMB Devices`,
	reflect.TypeFor[api.RequestedDevice]():    `Name Count Constraints`,
	reflect.TypeFor[api.LogConfig]():          `MaxFiles MaxFileSizeMB Disabled`,
	reflect.TypeFor[api.TaskArtifact]():       `GetterSource GetterOptions GetterHeaders GetterMode RelativeDest`,
	// Templates may refer only to what is fixed when the task starts, so that
	// nothing ever changes under one: modes, signals and splay are accepted and idle.
	reflect.TypeFor[api.Template](): `SourcePath DestPath EmbeddedTmpl ChangeMode ChangeSignal Once Splay Perms
		LeftDelim RightDelim Envvars`,
}

// setByState names the fields of a job that the state owns. Whoever sends a job
// back that he was given sends them along; they are not the user's to set.
const setByState = `Stop Status StatusDescription Stable Version SubmitTime CreateIndex ModifyIndex JobModifyIndex
	VersionTag NomadTokenID DispatchIdempotencyToken`

// neutral says of a field that is set whether it means the same as leaving it out.
// Servers of Nomad fill these in, and answers that they gave are submitted again.
var neutral = map[string]func(v any) bool{
	"Task.Identity":       func(v any) bool { return defaultIdentity(v.(*api.WorkloadIdentity)) },
	"TaskGroup.Consul":    func(v any) bool { return defaultConsul(v.(*api.Consul)) },
	"Task.Consul":         func(v any) bool { return defaultConsul(v.(*api.Consul)) },
	"LogConfig.Enabled":   func(v any) bool { return *v.(*bool) },
	"Template.VaultGrace": zero,
}

func zero(v any) bool { return isZero(reflect.ValueOf(v)) }

func defaultIdentity(id *api.WorkloadIdentity) bool {
	return (id.Name == "" || id.Name == "default") && !id.Env && !id.File && id.TTL == 0
}

func defaultConsul(c *api.Consul) bool {
	return c.Namespace == "" && c.Partition == "" && (c.Cluster == "" || c.Cluster == "default")
}

// unsupported reports every field below v that is set and not honoured, and every
// block that is null.
func (c *checker) unsupported(v reflect.Value, path string) {
	t := v.Type()
	fields := strings.Fields(honoured[t])
	for i := range t.NumField() {
		f, fv := t.Field(i), v.Field(i)
		if slices.Contains(fields, f.Name) {
			c.blocks(fv, join(path, hclName(f)))
			continue
		}
		if t == reflect.TypeFor[api.Job]() && slices.Contains(strings.Fields(setByState), f.Name) {
			continue
		}
		if isSet(t, f, fv) {
			c.fault(join(path, hclName(f)), notYet)
		}
	}
}

// blocks descends into a field that holds blocks.
func (c *checker) blocks(v reflect.Value, path string) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() && honoured[v.Type().Elem()] != "" {
			c.unsupported(v.Elem(), path)
		}
	case reflect.Slice:
		elem := v.Type().Elem()
		if elem.Kind() == reflect.Pointer {
			elem = elem.Elem()
		}
		if honoured[elem] == "" {
			return
		}
		for i := range v.Len() {
			item := v.Index(i)
			if item.Kind() == reflect.Pointer {
				if item.IsNil() {
					c.fault(fmt.Sprintf("%s[%d]", path, i), "is null")
					continue
				}
				item = item.Elem()
			}
			at := element(path, i, v.Len())
			if field, ok := labelField(elem); ok {
				at = join(path, labelOf(item.FieldByName(field)))
			}
			c.unsupported(item, at)
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
func isSet(t reflect.Type, f reflect.StructField, v reflect.Value) bool {
	if v.Kind() == reflect.Pointer && v.IsNil() {
		return false
	}
	if ok, found := neutral[t.Name()+"."+f.Name]; found {
		return !ok(v.Interface())
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
