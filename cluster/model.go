package cluster

// Model is a named line of versions (MLflow: registered model). Names are
// 1 to 128 of [a-zA-Z0-9_.-], first a letter or digit.
type Model struct {
	Name          string
	Description   string
	LatestVersion uint64
	Aliases       map[string]uint64
	CreateTime    int64
	CreateIndex   uint64
	ModifyIndex   uint64
}

// ModelVersion is one immutable artifact of a model with what was read from it.
type ModelVersion struct {
	Model       string
	Version     uint64 // 1, 2, 3…
	Digest      string // sha256:<hex>
	Size        int64  // bytes
	Platform    string // onnxruntime_onnx
	Inputs      []TensorSpec
	Outputs     []TensorSpec
	Properties  map[string]string // custom metadata of the ONNX file
	Origin      *ModelOrigin      // the work that made it, nil when nobody said
	CreateTime  int64
	CreateIndex uint64
	ModifyIndex uint64
}

// TensorSpec is a tensor of a model's signature; -1 in Shape is a dynamic size.
// Datatype is an Open Inference Protocol name (FP32, INT64, BYTES…).
type TensorSpec struct {
	Name     string
	Datatype string
	Shape    []int64
}
